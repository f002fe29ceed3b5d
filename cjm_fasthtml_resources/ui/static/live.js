// The page's script. It may be loaded more than once: what it declares are functions, and each element is watched once.
// biome-ignore lint/suspicious/noRedundantUseStrict: a classic script, which is no module
"use strict";

// Make `node` hold what `wanted` holds. Only the nodes that differ are touched, so that a selection, a scroll position
// and an open question stay. A `data-key` says which element is which: it takes what is open in it to its new place.
function patch(node, wanted) {
  const known = keyed(node);
  const stays = keyed(wanted);
  let at = node.firstChild;
  for (const want of [...wanted.childNodes]) {
    const old = known.get(want.dataset?.key) ?? at;
    if (isSame(old, want)) {
      if (old !== at) move(node, old, at);
      update(old, want);
      at = old.nextSibling;
    } else if (!at || stays.has(at.dataset?.key)) node.insertBefore(want, at);
    else {
      at.replaceWith(want);
      at = want.nextSibling;
    }
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function keyed(node) {
  const found = [...node.children].filter((child) => child.dataset.key);
  return new Map(found.map((child) => [child.dataset.key, child]));
}

// The newer way keeps the focus.
function move(node, child, before) {
  if (node.moveBefore) node.moveBefore(child, before);
  else node.insertBefore(child, before);
}

function update(old, want) {
  // charts are fetched apart (see charts.js)
  if (old.isEqualNode(want) || old.matches?.("[data-cjm-charts]")) return;
  if (old instanceof Text) old.data = want.data;
  else {
    adopt(old, want);
    patch(old, want);
  }
}

function isSame(old, want) {
  return old && old.nodeName === want.nodeName && old.dataset?.key === want.dataset?.key;
}

// Take all attributes but `open`, which the reader sets.
function adopt(old, want) {
  for (const { name } of [...old.attributes]) {
    if (!want.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  }
  for (const { name, value } of want.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
}

function put(element, html) {
  const box = document.createElement("template");
  box.innerHTML = html;
  // in the reader's order (see tables.js)
  element.closest(".cjm")?.cjmArrange?.(box.content);
  patch(element, box.content);
}

// An event of slots has two lines for each: its name, and its HTML.
function putSlots(root, data) {
  const lines = data.split("\n");
  for (let i = 0; i < lines.length; i += 2) {
    const slot = root.querySelector(`[data-cjm="${lines[i]}"]`);
    if (slot) put(slot, lines[i + 1]);
  }
}

// Today's moments without the date
function readTime(ms) {
  const time = new Date(ms);
  return time.toDateString() === new Date().toDateString() ? time.toLocaleTimeString() : time.toLocaleString();
}

// Why there is no stream, which an EventSource does not tell: a refusal, a page to log in at, an error. `ahead`: what
// the clock here is ahead of the server's, where the answer came soon enough to tell.
async function askWhy(url, patience) {
  const began = Date.now();
  const signal = AbortSignal.timeout(patience);
  const answer = await fetch(url, { redirect: "manual", cache: "no-store", signal }).catch(() => undefined);
  if (!answer) return {};
  answer.body?.cancel().catch(() => undefined);
  const now = Date.now();
  const date = Date.parse(answer.headers.get("date"));
  const isStream = answer.headers.get("content-type")?.startsWith("text/event-stream");
  return {
    ended: answer.type === "opaqueredirect" || [401, 403].includes(answer.status) || (answer.ok && !isStream),
    status: answer.ok ? 0 : answer.status,
    wait: 1e3 * answer.headers.get("retry-after"),
    ahead: now - began < 1e3 ? now - date : Number.NaN,
  };
}

function makeLogin() {
  const link = document.createElement("a");
  link.href = location.pathname + location.search;
  link.textContent = "log in again";
  return link;
}

// Keep one element up to date. While its tab is hidden there is no connection. A message says when it was sent, and the
// page's own clock, how long ago that was: a server that was stopped, a proxy that holds messages back and a broken
// network look alike here. Without this script, the style sheet greys what is shown.
function watch(root) {
  const [lost, place] = root.querySelectorAll("[data-cjm-lost], [data-cjm-place]");
  // relative to the page, whose own address can change later
  const url = new URL(root.dataset.cjmStream, document.baseURI);
  // when the figures were read, by the server's clock
  let shown = Number(root.dataset.cjmRead);
  // when the last message was sent: the page itself
  let sent = Number(root.dataset.cjmNow);
  // what the clock here is ahead of the server's, at most
  let ahead = Date.now() - sent;
  // a clock that nobody sets
  let heard = performance.now();
  // how old the message was then, in ms
  let late = 0;
  // ms after which figures are old
  let limit = 3e3;
  // ms until the next try
  let pause = 1e3;
  let why = ["Disconnected. "];
  let opened;
  let source;
  let timer;

  const age = () => Math.max(Date.now() - ahead - sent, performance.now() - heard + late);
  const say = (...parts) => {
    const text = parts.map((part) => part.textContent ?? part).join("");
    if (lost.textContent !== text) lost.replaceChildren(...parts);
    place.classList.toggle("old", text !== "");
  };
  const sayOld = () => say(...why, `Showing data from ${readTime(shown)}. Reconnecting …`);
  const close = () => {
    clearTimeout(timer);
    source?.close();
  };
  const lose = async () => {
    close();
    sayOld();
    pause = Math.min(1.5 * pause, 1e4);
    timer = setTimeout(open, pause * (0.7 + 0.6 * Math.random()));
    const lostSource = source;
    const found = await askWhy(url, limit);
    // there is a new one
    if (source !== lostSource) return;
    if (found.ahead) ahead = found.ahead;
    if (found.ended) why = ["Your session has ended: ", makeLogin(), ". "];
    else why = [found.status ? `The server answers with ${found.status}. ` : "Disconnected. "];
    sayOld();
    if (!found.wait) return;
    clearTimeout(timer);
    timer = setTimeout(open, found.wait);
  };
  const check = () => {
    clearTimeout(timer);
    const left = limit - age();
    if (left > 0) say();
    else if (performance.now() - opened > limit) return lose();
    else sayOld();
    // a timer sleeps when its machine does
    timer = setTimeout(check, left > 0 ? Math.min(left, 1e3) : 500);
  };
  const hear = (data) => {
    [limit, sent, shown] = data.split("\n").map(Number);
    root.dataset.cjmRead = shown;
    const now = Date.now();
    ahead = Math.min(ahead, now - sent);
    late = now - ahead - sent;
    heard = performance.now();
    if (late < limit) [pause, why] = [1e3, ["Disconnected. "]];
    check();
  };
  const open = () => {
    close();
    if (root.hasAttribute("data-cjm-paused")) return say(`Paused. Showing data from ${readTime(shown)}.`);
    if (document.hidden || !root.isConnected) return;
    if (root.dataset.cjmEvery) url.searchParams.set("every", root.dataset.cjmEvery);
    source = new EventSource(url);
    opened = performance.now();
    source.onerror = lose;
    source.addEventListener("layout", (event) => {
      put(place, event.data);
      root.cjmFillCharts?.();
    });
    source.addEventListener("slots", (event) => putSlots(root, event.data));
    source.addEventListener("beat", (event) => hear(event.data));
    check();
  };

  root.classList.remove("ages");
  document.addEventListener("visibilitychange", open);
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);
  root.addEventListener("cjm-open", open);
  open();
}

for (const root of document.querySelectorAll("[data-cjm-stream]:not([data-cjm-watched])")) {
  root.dataset.cjmWatched = "1";
  watch(root);
}
