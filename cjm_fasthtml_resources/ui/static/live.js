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
    else if (old instanceof Text && want instanceof Text) old.data = want.data;
    else if (isSame(old, want)) {
      copyAttributes(old, want);
      patch(old, want);
    } else old.replaceWith(want);
  });
  for (const old of have.slice(wanted.childNodes.length)) old.remove();
}

function isSame(old, want) {
  return old.tagName && old.tagName === want.tagName && old.dataset.key === want.dataset.key;
}

// All but `open`, which the reader sets.
function copyAttributes(old, want) {
  for (const { name } of [...old.attributes]) {
    if (!want.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  }
  for (const { name, value } of want.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
}

function put(element, html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  patch(element, template.content);
}

// An event of slots has two lines for each: its name, and its HTML.
function putSlots(root, data) {
  const lines = data.split("\n");
  for (let i = 0; i < lines.length; i += 2) {
    const slot = root.querySelector(`[data-cjm="${lines[i]}"]`);
    if (slot) put(slot, lines[i + 1]);
  }
}

// Keep one element up to date. While its tab is hidden there is no connection.
function watch(root) {
  const lost = root.querySelector("[data-cjm-lost]");
  const place = root.querySelector("[data-cjm-place]");
  let source;
  let last = new Date();
  let timer;

  const say = (text) => {
    if (lost.textContent !== text) lost.textContent = text;
  };
  const listen = (name, act) => {
    source.addEventListener(name, (event) => {
      last = new Date();
      say("");
      act(event.data);
    });
  };
  const close = () => {
    clearTimeout(timer);
    source?.close();
    source = null;
  };
  const open = () => {
    close();
    if (document.hidden || !root.isConnected) return;
    source = new EventSource(root.dataset.cjmStream);
    listen("layout", (html) => put(place, html));
    listen("slots", (data) => putSlots(root, data));
    listen("beat", () => {});
    source.onerror = () => {
      say(`The connection is lost. What is shown is of ${last.toLocaleTimeString()}; trying again …`);
      if (source?.readyState === EventSource.CLOSED) timer = setTimeout(open, 3000);
    };
  };

  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);
  open();
}

for (const root of document.querySelectorAll("[data-cjm-stream]")) {
  if (!root.dataset.cjmWatched) {
    root.dataset.cjmWatched = "1";
    watch(root);
  }
}
