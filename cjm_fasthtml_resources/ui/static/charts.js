// The charts of the page, which move on while they are open; figures.js comes before this file.
// It may be loaded more than once: what it declares are functions, and each element is taken once.
// biome-ignore lint/suspicious/noRedundantUseStrict: a classic script, which is no module
"use strict";

// Move a chart on: `wanted` has the columns that are new, and places all of them.
function moveChart(figure, wanted) {
  const [plot, next] = [figure, wanted].map((element) => element.querySelector(".plot"));
  const moved = next.dataset.first - plot.dataset.first;
  const known = new Map();
  const columns = plot.querySelector(".columns");
  const placeOf = (column) => Number(/-?\d+/.exec(column.getAttribute("transform"))[0]);
  for (const column of [...columns.children]) {
    const place = placeOf(column) - moved;
    column.setAttribute("transform", `translate(${place})`);
    if (place < 0) column.remove();
    else known.set(place, column);
  }
  for (const column of [...next.querySelector(".columns").children]) {
    const old = known.get(placeOf(column));
    if (!old) columns.append(column);
    else if (!old.isEqualNode(column)) {
      column.classList.toggle("at", old.classList.contains("at"));
      old.replaceWith(column);
    }
  }
  columns.setAttribute("viewBox", next.querySelector(".columns").getAttribute("viewBox"));
  for (const name of ["axis", "over"]) plot.querySelector(`.${name}`).replaceWith(next.querySelector(`.${name}`));
  plot.dataset.first = next.dataset.first;
  plot.ariaLabel = next.getAttribute("aria-label");
  const [legend, other] = [figure, wanted].map((element) => element.querySelector(".key"));
  if (!legend.isEqualNode(other)) legend.replaceWith(other);
}

// Put charts that came into their place: those that are there move on, if they are the same ones. False: they are not
function putCharts(root, body, wanted, isWhole) {
  const keysOf = (element) => [...element.querySelectorAll(".chart")].map((figure) => figure.dataset.key).join(" ");
  if (isWhole || keysOf(body) !== keysOf(wanted)) {
    if (!isWhole) return false;
    const isOpen = body.querySelector(".fold")?.open ?? false;
    body.replaceChildren(...wanted.childNodes);
    const fold = body.querySelector(".fold");
    if (fold) fold.open = isOpen;
    return true;
  }
  const figures = [...body.querySelectorAll(".chart")];
  for (const [i, next] of [...wanted.querySelectorAll(".chart")].entries()) {
    moveChart(figures[i], next);
    root.cjmClearFigures(figures[i].querySelector(".plot"));
  }
  const [notes, others] = [body, wanted].map((element) => element.querySelector(":scope > .note"));
  if (notes && others) notes.replaceWith(others);
  else if (notes) notes.remove();
  else if (others) body.append(others);
  return true;
}

// On the page: charts that are fetched while they are open, apart from the stream of changes.
function cjmCharts(root) {
  if (root.cjmFillCharts) return;
  cjmFigures(root);
  const url = new URL(root.dataset.cjmCharts, document.baseURI);
  const number = document.querySelectorAll("[data-cjm-charts-of]").length;
  const box = document.createElement("details");
  const body = document.createElement("div");
  const ranges = { "10m": "10 minutes", "1h": "1 hour", "24h": "24 hours" };
  const radios = Object.entries(ranges).map(([value, words]) => {
    const checked = value === "10m" ? "checked" : "";
    return `<label><input type="radio" name="cjm-range-${number}" value="${value}" ${checked}>${words}</label>`;
  });
  box.className = "charts fold";
  box.dataset.cjmChartsOf = "";
  box.innerHTML = `<summary>Charts</summary><fieldset><legend>Show the last</legend>${radios.join("")}</fieldset>`;
  box.append(body);
  let timer;
  let shown = "";
  let turn = 0;

  const isFilled = (fold) => fold.querySelector(".chart") !== null;
  // below the charts that are there
  const say = (text) => {
    const note = document.createElement("p");
    note.className = "note";
    note.textContent = text;
    body.querySelector(":scope > .note")?.remove();
    body.append(note);
  };
  const fetchFor = async (range, since) => {
    const workers = body.querySelector(".fold")?.open ? 1 : 0;
    const query = { range, workers, zone: -new Date().getTimezoneOffset() };
    for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
    if (since) url.searchParams.set("since", since);
    else url.searchParams.delete("since");
    const answer = await fetch(url, { redirect: "error", cache: "no-store", signal: AbortSignal.timeout(2e4) });
    if (!answer.ok) throw new Error(`The server answers with ${answer.status}.`);
    const wanted = document.createElement("template");
    wanted.innerHTML = await answer.text();
    return [wanted.content, answer.headers.get("cjm-charts")];
  };
  // the last column that is there can still grow
  const sinceOf = () => {
    const ends = [...body.querySelectorAll(".plot")].map((plot) => {
      const last = plot.querySelector(".columns > g:last-child")?.getAttribute("transform") ?? "0";
      return Number(plot.dataset.first) + Number(/-?\d+/.exec(last)[0]);
    });
    return ends.length ? Math.min(...ends) : 0;
  };
  const load = async () => {
    clearTimeout(timer);
    if (!box.open || document.hidden || root.hasAttribute("data-cjm-paused")) return;
    const mine = ++turn;
    const range = box.querySelector("input:checked").value;
    let pause = 5;
    try {
      let isWhole = !shown.startsWith(`${range} `);
      let [wanted, shape] = await fetchFor(range, isWhole ? 0 : sinceOf());
      if (mine !== turn) return;
      // more or fewer charts, or others
      if (!isWhole && (shape !== shown || !putCharts(root, body, wanted, false))) {
        isWhole = true;
        [wanted, shape] = await fetchFor(range, 0);
        if (mine !== turn) return;
      }
      if (isWhole) putCharts(root, body, wanted, true);
      shown = shape;
      pause = Number(shape.split(" ")[1]);
    } catch (error) {
      if (mine !== turn) return;
      say(`Cannot load the charts: ${error.message} Trying again …`);
    }
    timer = setTimeout(load, 1e3 * pause);
  };

  // of the charts, and of those of workers in them, whose event does not bubble
  box.addEventListener("toggle", ({ target }) => (target === box || isFilled(target) !== target.open) && load(), true);
  box.addEventListener("change", load);
  document.addEventListener("visibilitychange", load);
  root.addEventListener("cjm-open", load);
  root.cjmFillCharts = () => {
    const place = root.querySelector("[data-cjm-charts]");
    if (place && box.parentNode !== place) place.replaceChildren(box);
  };
  root.cjmFillCharts();
}

for (const root of document.querySelectorAll("[data-cjm-stream][data-cjm-charts]")) cjmCharts(root);
