// The header of the page at /resources: the time of the sample, pause, interval and icon of this tab, and the notice
// when there is room. The figures themselves are the business of live.js.
// biome-ignore lint/suspicious/noRedundantUseStrict: a classic script, which is no module
"use strict";

function part(header, name) {
  return header.querySelector(`[data-cjm-${name}]`);
}

// live.js notes when the figures were read that it shows, in ms since the epoch.
function showTime(clock, moment) {
  const text = moment.toLocaleTimeString();
  if (clock.textContent === text) return;
  clock.textContent = text;
  clock.title = moment.toLocaleString();
  clock.dateTime = moment.toISOString();
}

// live.js reads what is set here whenever it opens its stream.
function steer(header, root) {
  const pause = part(header, "pause");
  const every = part(header, "every");
  const open = () => root.dispatchEvent(new Event("cjm-open"));
  pause.addEventListener("click", () => {
    const paused = root.toggleAttribute("data-cjm-paused");
    pause.textContent = paused ? "Resume" : "Pause";
    open();
  });
  every.addEventListener("change", () => {
    root.dataset.cjmEvery = every.value;
    open();
  });
}

// The icon tells the answer for the GPUs, or that the figures are old.
function colour(link, root) {
  const icons = JSON.parse(link.dataset.cjmIcons);
  const banner = root.querySelector('[data-cjm="banner"] .banner');
  const isOld = root.querySelector("[data-cjm-place].old, .state.stale");
  const status = Object.keys(icons).find((name) => banner?.classList.contains(name));
  const icon = icons[(!isOld && status) || "old"];
  if (link.getAttribute("href") !== icon) link.setAttribute("href", icon);
}

function follow(header, root) {
  const clock = part(header, "time");
  const link = document.querySelector("link[data-cjm-icons]");
  const show = () => {
    showTime(clock, new Date(+root.dataset.cjmRead));
    colour(link, root);
  };
  if (clock.dateTime) showTime(clock, new Date(clock.dateTime));
  colour(link, root);
  new MutationObserver(show).observe(root, { attributes: true, childList: true, subtree: true });
}

// A notice of the browser, where there can be one: it needs https or localhost, and the reader's word.
async function mayNotify() {
  if (!("Notification" in window)) return false;
  if (Notification.permission === "default") await Notification.requestPermission();
  return Notification.permission === "granted";
}

function notify(title, body) {
  try {
    const notice = new Notification(title, { body, tag: "cjm-resources", requireInteraction: true });
    notice.onclick = () => window.focus();
  } catch {
    // Chrome on Android has no such constructor; the page says it
  }
}

// ms without a connection, after which a wish has ended
const PATIENCE = 6e4;
// ms until a stream that was refused is tried again
const AGAIN = 5e3;

// Ask the server to tell when there is room, also while the tab is hidden, and say what it answers.
function tell(header) {
  const form = header.querySelector("form");
  const said = part(header, "said");
  const stop = part(header, "stop");
  const title = document.title;
  const url = new URL(form.dataset.cjmWish, document.baseURI);
  let source;
  let timer;
  let lostAt = 0;
  let notice = "";
  let latest = "";

  const say = (text) => {
    if (said.textContent !== text) said.textContent = text;
  };
  const close = () => {
    clearTimeout(timer);
    source?.close();
    source = undefined;
    stop.hidden = true;
  };
  const end = (heading, text) => {
    close();
    say(`${heading}: ${text}`);
    document.title = `● ${title}`;
    notify(`${heading} on ${header.dataset.cjmHost || location.host}`, text);
  };
  const wait = (text) => {
    lostAt = 0;
    latest = text;
    say(`Waiting for ${form.elements.gib.value} GiB on one GPU. ${text} ${notice}`);
  };
  const lose = () => {
    lostAt ||= Date.now();
    say("Waiting, but the server does not answer. Trying again …");
    if (Date.now() - lostAt > PATIENCE) end("No longer waiting", "the server does not answer.");
    else if (source.readyState === EventSource.CLOSED) timer = setTimeout(open, AGAIN);
  };
  const open = () => {
    source?.close();
    url.searchParams.set("size", `${form.elements.gib.value}GiB`);
    source = new EventSource(url);
    source.onerror = lose;
    source.addEventListener("waiting", ({ data }) => wait(data));
    source.addEventListener("granted", ({ data }) => end("There is room", data));
    source.addEventListener("ended", ({ data }) => end("Not possible", data));
  };

  // It waits at once: the browser's question may stay open for long.
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    close();
    document.title = title;
    wait("");
    stop.hidden = false;
    open();
    const allowed = await mayNotify();
    notice = allowed ? "" : "This browser shows no notifications from here, so look at the title of this tab.";
    if (source) wait(latest);
  });
  stop.addEventListener("click", () => {
    close();
    say("No longer waiting.");
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && !source) document.title = title;
  });
}

function startPage(header) {
  const root = document.querySelector("[data-cjm-stream]");
  for (const name of ["pause", "tell"]) part(header, name).hidden = false;
  part(header, "every").closest("label").hidden = false;
  steer(header, root);
  follow(header, root);
  tell(header);
}

startPage(document.querySelector("[data-cjm-page]"));
