// Shows a LiveView (see ui.live_view) where a front end shows anywidgets. The figures are put into place as on the page
// (live.js), tables are sorted and filtered as there (tables.js), and charts are read as there (figures.js).
function render({ model, el }) {
  const root = document.createElement("div");
  const [style, beat, place] = ["style", "div", "div"].map((tag) => document.createElement(tag));
  root.className = `cjm ${model.get("name")}`;
  // it is told by the model, not by a stream of its own
  root.dataset.cjmStream = "";
  root.dataset.cjmWatched = "1";
  style.textContent = model.get("style");
  root.append(style, beat, place);
  el.append(root);
  cjmTables(root);
  cjmFigures(root);
  let turn = 0;
  // the answer is the whole picture; a random number, because several pages can ask
  const ask = () => {
    model.set("asked", Math.random());
    model.save_changes();
  };
  const draw = () => {
    const charts = place.querySelector("[data-cjm-charts]");
    if (charts) charts.innerHTML = model.get("charts");
  };
  const show = () => {
    turn = model.get("whole").turn;
    put(place, model.get("whole").html);
    draw();
  };
  const change = () => {
    const { turn: now, slots } = model.get("change");
    if (now !== turn + 1) return ask();
    turn = now;
    for (const [name, html] of Object.entries(slots)) {
      const slot = place.querySelector(`[data-cjm="${name}"]`);
      if (slot) put(slot, html);
    }
  };
  const pulse = () => {
    beat.innerHTML = model.get("beat");
  };
  // a page that is closed says nothing, so one that is open does
  const sign = () => {
    model.set("signs", model.get("signs") + 1);
    model.save_changes();
  };
  const timer = setInterval(sign, 1e3 * model.get("every"));
  show();
  pulse();
  sign();
  model.on("change:whole", show);
  model.on("change:change", change);
  model.on("change:charts", draw);
  model.on("change:beat", pulse);
  ask();
  return () => {
    clearInterval(timer);
    model.off("change:whole", show);
    model.off("change:change", change);
    model.off("change:charts", draw);
    model.off("change:beat", pulse);
  };
}

export default { render };
