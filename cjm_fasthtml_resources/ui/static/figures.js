// Figures of the charts of an element `.cjm`, under the pointer and by arrow keys, on the page and in a notebook panel.
// It may be loaded more than once: what it declares is a function, and each element is taken once.
// biome-ignore lint/suspicious/noRedundantUseStrict: a classic script, which is no module
"use strict";

// The figures of the column that is looked at, and what happened then, stand below the chart, in a room that is kept
// for them. A click, a tap or Enter keeps the column, and makes room for all of its text, until another one or Escape.
function cjmFigures(root) {
  if (root.cjmClearFigures) return;
  // in a notebook, charts are replaced as a whole: the columns that have the focus and that are kept, as [key, number]
  let focused;
  let kept;
  let isOpen = false;
  // where the pointer went down, and the column that was kept then
  let pressed;
  const plotOf = ({ target }) => target.closest?.(".plot");
  const outputOf = (plot) => plot.parentNode.querySelector("output");
  const columnsOf = (plot) => [...plot.querySelectorAll(".columns > g")];
  const titleOf = (element) => element?.querySelector("title").textContent ?? "";
  const placeOf = (column) => Number(/-?\d+/.exec(column.getAttribute("transform"))[0]);

  const keyOf = (plot) => plot.parentNode.dataset.key;
  const numberOf = (column) => Number(column.closest(".plot").dataset.first) + placeOf(column);
  const isKept = (plot) => plot.parentNode.classList.contains("kept");
  const find = ([key, number]) => {
    const plot = [...root.querySelectorAll(".plot")].find((other) => keyOf(other) === key);
    return [plot, plot && columnsOf(plot).find((column) => numberOf(column) === number)];
  };

  const part = (name, text, kind) => {
    const element = document.createElement(name);
    element.textContent = text;
    if (kind) element.className = kind;
    return element;
  };
  const write = (plot, column, events) => {
    const output = outputOf(plot);
    const owners = [...plot.parentNode.querySelectorAll("div.key i")];
    const [when, ...figures] = titleOf(column).split(" · ");
    const parts = figures.map((text) => {
      const owner = owners.find((other) => text.startsWith(`${other.textContent.split(" (")[0]} `));
      return part(owner ? "i" : "span", text, owner?.className);
    });
    const marks = events.map((text) => part("i", text, "event"));
    output.replaceChildren(...[part("b", when), ...parts, ...marks].flatMap((element) => [element, " "]));
    output.classList.toggle("more", output.scrollHeight > output.clientHeight + 1);
  };
  const unmark = (plot) => {
    for (const column of plot.querySelectorAll(".at")) column.classList.remove("at");
  };
  const clear = (plot) => {
    unmark(plot);
    outputOf(plot).classList.remove("at");
    if (columnsOf(plot).length) write(plot, columnsOf(plot).at(-1), []);
  };
  const show = (plot, column) => {
    const mark = plot.querySelector(`.mark[data-x="${placeOf(column)}"]`);
    unmark(plot);
    column.classList.add("at");
    outputOf(plot).classList.add("at");
    if (document.activeElement === plot) focused = [keyOf(plot), numberOf(column)];
    if (isKept(plot)) kept = [keyOf(plot), numberOf(column)];
    write(plot, column, mark ? titleOf(mark).split("\n") : []);
  };
  const release = () => {
    kept = undefined;
    for (const figure of root.querySelectorAll(".chart.kept")) {
      const plot = figure.querySelector(".plot");
      const at = plot.querySelector(".at");
      figure.classList.remove("kept");
      if (at && (plot.matches(":hover") || document.activeElement === plot)) show(plot, at);
      else clear(plot);
    }
  };
  const keep = (plot, column) => {
    if (!isKept(plot)) release();
    kept = [keyOf(plot), numberOf(column)];
    plot.parentNode.classList.add("kept");
    show(plot, column);
  };
  // of the plot, and not of its columns: browsers measure an inner drawing by what it has, not by its width of 100 %
  const near = (plot, event) => {
    const box = plot.getBoundingClientRect();
    const count = plot.querySelector(".columns").viewBox.baseVal.width;
    const x = ((event.clientX - box.left) / box.width) * count - 0.5;
    const far = (column) => Math.abs(placeOf(column) - x);
    return columnsOf(plot).reduce((best, column) => (best && far(best) <= far(column) ? best : column), undefined);
  };

  root.addEventListener("pointermove", (event) => {
    const plot = plotOf(event);
    const column = plot && !isKept(plot) && near(plot, event);
    if (column && !column.classList.contains("at")) show(plot, column);
  });
  root.addEventListener("pointerdown", (event) => {
    const plot = plotOf(event);
    const column = plot && near(plot, event);
    pressed = [plot, plot && isKept(plot) ? kept[1] : undefined];
    if (column && !isKept(plot)) show(plot, column);
  });
  root.addEventListener("pointerup", (event) => {
    const plot = plotOf(event);
    const column = plot && near(plot, event);
    if (!column || event.button > 0 || pressed?.[0] !== plot) return;
    if (isKept(plot) && pressed[1] === numberOf(column)) release();
    else keep(plot, column);
  });
  root.addEventListener("pointerout", (event) => {
    const plot = plotOf(event);
    if (!plot || isKept(plot) || plot.contains(event.relatedTarget) || document.activeElement === plot) return;
    clear(plot);
  });
  root.addEventListener("focusin", (event) => {
    const plot = plotOf(event);
    if (!plot) return;
    outputOf(plot).ariaLive = "polite";
    if (!plot.matches(":hover") && !isKept(plot) && columnsOf(plot).length) show(plot, columnsOf(plot).at(-1));
  });
  root.addEventListener("focusout", (event) => {
    const plot = plotOf(event);
    if (!plot) return;
    outputOf(plot).ariaLive = "off";
    if (!isKept(plot)) clear(plot);
    if (event.relatedTarget) focused = undefined;
  });
  root.addEventListener("keydown", (event) => {
    const plot = plotOf(event);
    const columns = plot ? columnsOf(plot) : [];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = columns.findIndex((column) => column.classList.contains("at"));
    const last = columns.length - 1;
    const places = { ArrowLeft: Math.max(at - 1, 0), ArrowRight: Math.min(at + 1, last), Home: 0, End: last };
    if (event.key === "Escape" && plot && kept) release();
    else if (event.key in places && columns.length) show(plot, columns[places[event.key]]);
    else if ((event.key === "Enter" || event.key === " ") && at >= 0) {
      if (isKept(plot)) release();
      else keep(plot, columns[at]);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  root.addEventListener("toggle", ({ target }) => target.matches(".fold:has(.chart)") && keepOpen(target), true);
  const keepOpen = (fold) => {
    isOpen = fold.open;
  };
  const restore = (changes) => {
    // not by what is written below a chart
    if (changes.every(({ target }) => target.closest?.("output"))) return;
    const fold = root.querySelector(".fold:has(.chart)");
    if (fold && fold.open !== isOpen) fold.open = isOpen;
    if (focused && document.activeElement === document.body) {
      const [plot, column] = find(focused);
      plot?.focus({ preventScroll: true });
      if (column) show(plot, column);
    }
    if (!kept || root.querySelector(".chart.kept")) return;
    const [plot, column] = find(kept);
    if (column) keep(plot, column);
    else if (plot) kept = undefined;
  };
  const observer = new MutationObserver(restore);
  if (!root.matches("[data-cjm-charts]")) observer.observe(root, { childList: true, subtree: true });
  root.cjmClearFigures = (plot) => {
    const at = plot.querySelector(".at");
    if (at) show(plot, at);
    else if (isKept(plot)) release();
    else clear(plot);
  };
}

for (const root of document.querySelectorAll(".cjm")) cjmFigures(root);
