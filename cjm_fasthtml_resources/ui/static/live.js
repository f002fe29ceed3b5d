// The page's script. It may be loaded more than once: what it declares are functions, and each element is watched once.
// biome-ignore lint/suspicious/noRedundantUseStrict: a classic script, which is no module
"use strict";

// Make `node` hold what `wanted` holds. Only the nodes that differ are touched, so that a selection, a scroll position
// and an open question stay. A `data-key` says which element is which, so that no question moves to another worker.
function patch(node, wanted) {
  const have = [...node.childNodes];
  [...wanted.childNodes].forEach((want, i) => {
    const old = have[i];
    if (!old) node.append(want);
    else if (old.isEqualNode(want)) return;
    else if (!isSame(old, want)) old.replaceWith(want);
    else if (old instanceof Text) old.data = want.data;
    else {
      adopt(old, want);
      patch(old, want);
    }
  });
  for (const old of have.slice(wanted.childNodes.length)) old.remove();
}

function isSame(old, want) {
  return old.nodeName === want.nodeName && old.dataset?.key === want.dataset?.key;
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
