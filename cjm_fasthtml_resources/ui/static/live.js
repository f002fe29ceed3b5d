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
  if (old.isEqualNode(want)) return;
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

// Keep one element up to date. While its tab is hidden there is no connection. When nothing was heard for three signs
// of life, its figures are old: a server that was stopped, a proxy that holds back, a broken network look alike here.
function watch(root) {
  const [lost, place] = root.querySelectorAll("[data-cjm-lost], [data-cjm-place]");
  // relative to the page, whose own address can change later
  const url = new URL(root.dataset.cjmStream, document.baseURI);
  let source;
  let last = new Date();
  let limit = 5e3;
  let timer;

  const say = (text) => {
    if (lost.textContent !== text) lost.textContent = text;
    place.classList.toggle("old", text);
  };
  const close = () => {
    clearTimeout(timer);
    source?.close();
  };
  const lose = () => {
    close();
    const time = last.toLocaleTimeString();
    say(`Disconnected. Showing data from ${time}. Reconnecting …`);
    timer = setTimeout(open, 1e3 + 1e3 * Math.random());
  };
  const wait = () => {
    clearTimeout(timer);
    timer = setTimeout(lose, limit);
  };
  const listen = (name, act) => {
    source.addEventListener(name, (event) => {
      act(event.data);
      last = new Date();
      say("");
      wait();
    });
  };
  const open = () => {
    close();
    if (document.hidden || !root.isConnected) return;
    source = new EventSource(url);
    source.onerror = lose;
    listen("layout", (html) => put(place, html));
    listen("slots", (data) => putSlots(root, data));
    listen("beat", (data) => {
      limit = +data;
    });
    wait();
  };

  document.addEventListener("visibilitychange", open);
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);
  open();
}

for (const root of document.querySelectorAll("[data-cjm-stream]:not([data-cjm-watched])")) {
  root.dataset.cjmWatched = "1";
  watch(root);
}
