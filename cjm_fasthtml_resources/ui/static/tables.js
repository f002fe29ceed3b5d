// Sorts and filters the tables of an element `.cjm`, on the page and in the notebook panel, while their rows come anew.
// It may be loaded more than once: what it declares is a function, and each element is taken once.
// biome-ignore lint/suspicious/noRedundantUseStrict: a classic script, which is no module
"use strict";

function cjmTables(root) {
  if (root.cjmArrange) return;
  const units = { MiB: 1, GiB: 1024, TiB: 1048576, min: 1, h: 60, d: 1440, "%": 1 };
  const sorted = new Map();
  let words = [];
  let focused;

  // A table's name and its halves: in the panel, the memory is a table beside the rest.
  const nameOf = (table) => table.caption.firstChild?.textContent.trim();
  const headOf = (th) => th.textContent.trim();
  const groups = (scope) =>
    [...scope.querySelectorAll("table:not(.only)")].map((table) => [
      table,
      ...(table.closest(".halves")?.querySelectorAll("table.only") ?? []),
    ]);

  // Sizes and ages as numbers; what is unknown as nothing, which comes last.
  const keyOf = (text) => {
    const parts = [...text.matchAll(/([\d.]+) (MiB|GiB|TiB|min|h|d|%)(?!\w)/g)];
    if (parts.length) return parts.reduce((sum, [, figure, unit]) => sum + figure * units[unit], 0);
    return text === "unknown" || text === "?" ? "" : text;
  };
  const compare = (a, b, down) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const order =
      typeof a === "number" && typeof b === "number"
        ? a - b
        : `${a}`.localeCompare(`${b}`, undefined, { numeric: true });
    return down ? -order : order;
  };

  // The rows of a group, each with its parts in the tables; their number is their place as they came.
  const rowsOf = (tables) => {
    const found = new Map();
    for (const table of tables) {
      [...(table.tBodies[0]?.rows ?? [])].forEach((tr, i) => {
        tr.dataset.i ??= i;
        found.set(tr.dataset.i, [...(found.get(tr.dataset.i) ?? []), tr]);
      });
    }
    return [...found.entries()].sort((a, b) => a[0] - b[0]).map(([, parts]) => parts);
  };

  const prepare = (th, by) => {
    const name = headOf(th);
    let button = th.querySelector("button");
    if (!button && name) {
      button = document.createElement("button");
      button.type = "button";
      button.dataset.lmSuppressShortcuts = "true";
      button.append(name);
      th.replaceChildren(button);
    }
    if (by?.name === name) th.setAttribute("aria-sort", by.down ? "descending" : "ascending");
    else th.removeAttribute("aria-sort");
  };

  // Arrange one table: its headers, the order of its rows, and which of them are shown.
  const arrange = (tables) => {
    const by = sorted.get(nameOf(tables[0]));
    const heads = tables.flatMap((table) => [...(table.tHead?.rows[0].cells ?? [])]);
    for (const th of heads) prepare(th, by);
    const rows = rowsOf(tables);
    const column = by ? heads.findIndex((th) => headOf(th) === by.name) : -1;
    if (column >= 0) {
      const key = (parts) => keyOf(parts.flatMap((tr) => [...tr.cells])[column]?.textContent.trim() ?? "");
      const keys = new Map(rows.map((parts) => [parts, key(parts)]));
      rows.sort((a, b) => compare(keys.get(a), keys.get(b), by.down));
    }
    tables.forEach((table, half) => {
      const wanted = rows.map((parts) => parts[half]).filter(Boolean);
      const body = table.tBodies[0];
      if (body && wanted.some((tr, i) => body.rows[i] !== tr)) body.append(...wanted);
    });
    if (tables[0].matches(".totals")) return [0, 0];
    let shown = 0;
    for (const parts of rows) {
      const text = parts.map((tr) => tr.textContent.toLowerCase()).join(" ");
      const fits = words.every((word) => text.includes(word));
      for (const tr of parts) if (tr.hidden === fits) tr.hidden = !fits;
      shown += fits;
    }
    return [shown, rows.length];
  };

  const say = (text) => {
    for (const place of root.querySelectorAll("[data-cjm-filter] small")) {
      if (place.textContent !== text) place.textContent = text;
    }
  };
  const count = (scope, found) => {
    const [shown, all] = found.reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);
    const left = [...scope.querySelectorAll("table:not(.totals) caption small")];
    const more = left.reduce((sum, small) => sum + +(/and (\d+) more/.exec(small.textContent)?.[1] ?? 0), 0);
    say(words.length ? `${shown} of ${all} rows${more ? `; ${more} more are not listed, so not searched` : ""}` : "");
  };

  const addFilter = (place) => {
    if (place.firstChild) return;
    const input = document.createElement("input");
    const label = document.createElement("label");
    const said = document.createElement("small");
    input.type = "search";
    input.value = words.join(" ");
    input.dataset.lmSuppressShortcuts = "true";
    said.setAttribute("role", "status");
    label.append("Filter ", input);
    place.append(label, " ", said);
  };

  // `scope` is the element itself, or what will be put into it.
  const arrangeAll = (scope) => {
    for (const place of scope.querySelectorAll("[data-cjm-filter]")) addFilter(place);
    const found = groups(scope).map(arrange);
    if (scope === root) count(root, found);
    else queueMicrotask(() => watched(() => arrangeAll(root)));
  };

  root.addEventListener("click", (event) => {
    const th = event.target.closest?.("th");
    if (!th || !event.target.closest("button")) return;
    const tables = groups(root).find((group) => group.includes(th.closest("table")));
    const [table, name, before] = [nameOf(tables[0]), headOf(th), sorted.get(nameOf(tables[0]))];
    const first = th.matches(".n") || th.closest("table").matches(".only");
    if (before?.name !== name) sorted.set(table, { name, down: first });
    else if (before.down === first) sorted.set(table, { name, down: !first });
    else sorted.delete(table);
    watched(() => arrangeAll(root));
  });
  root.addEventListener("input", (event) => {
    if (!event.target.closest?.("[data-cjm-filter]")) return;
    words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    watched(() => arrangeAll(root));
  });
  // what is cut off is told in full
  root.addEventListener("pointerover", ({ target }) => {
    if (target.matches?.("td:not([title])") && target.scrollWidth > target.clientWidth)
      target.title = target.textContent;
  });

  // In a notebook a table is replaced as a whole, and with it the button that has the focus.
  root.addEventListener("focusin", ({ target }) => {
    const th = target.closest("th");
    focused = th && [th.closest("table").className, headOf(th)];
  });
  root.addEventListener("focusout", ({ relatedTarget }) => {
    if (relatedTarget) focused = undefined;
  });
  const refocus = () => {
    if (!focused || document.activeElement !== document.body) return;
    const heads = [...root.querySelectorAll("th")];
    heads.find((th) => th.closest("table").className === focused[0] && headOf(th) === focused[1])?.firstChild.focus?.();
  };
  const observer = new MutationObserver(() =>
    watched(() => {
      arrangeAll(root);
      refocus();
    }),
  );
  function watched(act) {
    observer.disconnect();
    act();
    // on the page, what comes anew is arranged before it is put there
    if (!root.matches("[data-cjm-stream]")) observer.observe(root, { childList: true, subtree: true });
  }

  root.cjmArrange = arrangeAll;
  watched(() => arrangeAll(root));
}

for (const root of document.querySelectorAll(".cjm")) cjmTables(root);
