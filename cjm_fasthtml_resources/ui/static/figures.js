// Figures of the charts of an element `.cjm`, under the pointer and by arrow keys, on the page and in a notebook panel.
// It may be loaded more than once: what it declares is a function, and each element is taken once.
// biome-ignore lint/suspicious/noRedundantUseStrict: a classic script, which is no module
"use strict";

// The figures of the column that is looked at, and what happened then, stand above the chart.
function cjmFigures(root) {
  if (root.cjmClearFigures) return;
  // in a notebook, charts are replaced as a whole: which one has the focus, its column, and whether workers are shown
  let focused;
  let isOpen = false;
  const plotOf = ({ target }) => target.closest?.(".plot");
  const columnsOf = (plot) => [...plot.querySelectorAll(".columns > g")];
  const titleOf = (element) => element?.querySelector("title").textContent ?? "";
  const placeOf = (column) => Number(/-?\d+/.exec(column.getAttribute("transform"))[0]);

  const keyOf = (plot) => plot.parentNode.dataset.key;
  const numberOf = (column) => Number(column.closest(".plot").dataset.first) + placeOf(column);

  const clear = (plot) => {
    const output = plot.parentNode.querySelector("output");
    for (const column of plot.querySelectorAll(".at")) column.classList.remove("at");
    output.classList.remove("at");
    output.textContent = titleOf(columnsOf(plot).at(-1));
  };
  const show = (plot, column) => {
    const output = plot.parentNode.querySelector("output");
    const mark = plot.querySelector(`.mark[data-x="${placeOf(column)}"]`);
    for (const other of plot.querySelectorAll(".at")) other.classList.remove("at");
    column.classList.add("at");
    output.classList.add("at");
    if (document.activeElement === plot) focused = [keyOf(plot), numberOf(column)];
    output.textContent = [titleOf(column), ...(mark ? titleOf(mark).split("\n") : [])].join(" · ");
  };
  const near = (plot, event) => {
    const box = plot.querySelector(".columns").getBoundingClientRect();
    const count = plot.querySelector(".columns").viewBox.baseVal.width;
    const x = ((event.clientX - box.left) / box.width) * count - 0.5;
    const far = (column) => Math.abs(placeOf(column) - x);
    return columnsOf(plot).reduce((best, column) => (best && far(best) <= far(column) ? best : column), undefined);
  };

  root.addEventListener("pointermove", (event) => {
    const plot = plotOf(event);
    const column = plot && near(plot, event);
    if (column && !column.classList.contains("at")) show(plot, column);
  });
  root.addEventListener("pointerout", (event) => {
    const plot = plotOf(event);
    if (plot && !plot.contains(event.relatedTarget) && document.activeElement !== plot) clear(plot);
  });
  root.addEventListener("focusin", (event) => {
    const plot = plotOf(event);
    if (!plot) return;
    plot.parentNode.querySelector("output").ariaLive = "polite";
    if (!plot.matches(":hover") && columnsOf(plot).length) show(plot, columnsOf(plot).at(-1));
  });
  root.addEventListener("focusout", (event) => {
    const plot = plotOf(event);
    if (!plot) return;
    plot.parentNode.querySelector("output").ariaLive = "off";
    clear(plot);
    if (event.relatedTarget) focused = undefined;
  });
  root.addEventListener("keydown", (event) => {
    const plot = plotOf(event);
    const columns = plot ? columnsOf(plot) : [];
    const at = columns.findIndex((column) => column.classList.contains("at"));
    const last = columns.length - 1;
    const places = { ArrowLeft: Math.max(at - 1, 0), ArrowRight: Math.min(at + 1, last), Home: 0, End: last };
    if (!columns.length || !(event.key in places) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    show(plot, columns[places[event.key]]);
  });
  root.addEventListener("toggle", ({ target }) => target.matches(".fold:has(.chart)") && keepOpen(target), true);
  const keepOpen = (fold) => {
    isOpen = fold.open;
  };
  const restore = () => {
    const fold = root.querySelector(".fold:has(.chart)");
    if (fold && fold.open !== isOpen) fold.open = isOpen;
    if (!focused || document.activeElement !== document.body) return;
    const [key, number] = focused;
    const plot = [...root.querySelectorAll(".plot")].find((other) => keyOf(other) === key);
    if (!plot) return;
    plot.focus({ preventScroll: true });
    const column = columnsOf(plot).find((other) => numberOf(other) === number);
    if (column) show(plot, column);
  };
  const observer = new MutationObserver(restore);
  if (!root.matches("[data-cjm-charts]")) observer.observe(root, { childList: true, subtree: true });
  root.cjmClearFigures = (plot) => {
    const at = plot.querySelector(".at");
    if (at) show(plot, at);
    else clear(plot);
  };
}

for (const root of document.querySelectorAll(".cjm")) cjmFigures(root);
