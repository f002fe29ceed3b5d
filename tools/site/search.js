// The site's search. It reads search.json and finds each section with the words of a question, or with words that mean
// the same. It takes over the search box of smalldocs, whose own search matches letters instead of words.
(() => {
  // Words that a reader may type for the same thing. The pages use the first of each row.
  const SAME = [
    "free available room unused spare left",
    "GPU card device graphics CUDA",
    "memory VRAM",
    "RAM host",
    "reserve reservation promise claim book lock hold",
    "stop kill end terminate",
    "wait queue request line",
    "user owner who whose person",
    "use allocate occupy consume busy",
    "container Docker Kubernetes pod WSL",
    "install pip setup",
    "cost overhead speed performance slow fast latency",
    "error exception raise fail trouble",
    "notify mail message chat Slack",
    "Prometheus Grafana metrics dashboard alert",
    "page web browser serve",
    "notebook Jupyter panel widget",
    "history past yesterday night record report",
    "machines cluster hosts ssh remote several",
    "estimate need predict guess require",
    "simulate test fake mock",
    "migration upgrade change",
    "MIG instance partition",
    "command terminal shell cli",
  ].map((row) => row.toLowerCase().split(" "));

  const SKIP = new Set(
    (
      "a an and any are as at be been by can could do does for from get give has have how i if in is it its many me " +
      "much my of on one or see should show so that the their there this to was we what when where which will with " +
      "would you your"
    ).split(" "),
  );

  const escapePattern = (word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const stem = (word) => (word.length > 4 ? word.replace(/(?:ations?|ing|ed|es|e|s)$/, "") : word);

  // A word and its forms; a short word, such as "gpu", also in the plural
  const pattern = (word) => {
    const root = stem(word);
    return `\\b${escapePattern(root)}${root.length > 3 ? "\\w*" : "s?\\b"}`;
  };

  // The words of a question, each with the words that mean the same
  const readQuestion = (question) => {
    const all = question.toLowerCase().match(/[\p{L}\p{N}_.-]+/gu) || [];
    const words = all.filter((word) => !SKIP.has(word));
    return (words.length ? words : all).map((word) => {
      const roots = stem(word);
      const rows = SAME.filter((row) => row.some((other) => other === word || stem(other) === roots));
      const others = [...new Set(rows.flat())].filter((other) => stem(other) !== roots);
      return {
        exact: new RegExp(pattern(word), "gi"),
        same: others.length ? new RegExp(others.map(pattern).join("|"), "gi") : null,
      };
    });
  };

  const count = (text, regex) => (regex && text ? (text.match(regex) || []).length : 0);

  // How well one word of the question fits a section: headings count most, then how often the text has the word
  const fit = (entry, { exact, same }) => {
    const read = (regex) => {
      const found = count(entry.text, regex);
      const often = found ? found / (found + 1 + entry.text.length / 800) : 0;
      return 1.5 * Math.min(count(entry.title, regex), 1) + 2 * Math.min(count(entry.section, regex), 1) + 3 * often;
    };
    return Math.max(read(exact), 0.6 * read(same));
  };

  // Whether a text has all words of the question near one another, as a sentence about them has
  const areNear = (text, words) => {
    const places = words.map(({ exact, same }) =>
      [exact, same].flatMap((regex) => (regex ? [...text.matchAll(regex)].map((match) => match.index) : [])),
    );
    const near = (a, b) => Math.abs(a - b) < 60;
    return places[0].some((first) => places.every((others) => others.some((other) => near(first, other))));
  };

  // Frequent questions first, then guides; the simulated driver is for tests
  const weightOf = ({ href, asked }) =>
    asked ? 4 : /^(?:index|tutorials\/)/.test(href) ? 2 : /^simulate/.test(href) ? 0.5 : 1;

  // The sections that answer a question, the best first and at most two of a page
  window.searchPages = (entries, question, limit = 20) => {
    const words = readQuestion(question);
    const rated = entries.flatMap((entry) => {
      const fits = words.map((word) => fit(entry, word));
      const found = fits.filter(Boolean).length / words.length;
      if (!found) return [];
      const near = words.length > 1 && found === 1 && areNear(entry.text, words) ? 1.5 : 1;
      const isName = entry.section.toLowerCase() === question.trim().toLowerCase();
      return [
        { entry, rate: (isName ? 100 : 0) + fits.reduce((a, b) => a + b, 0) * found ** 3 * near * weightOf(entry) },
      ];
    });
    const shown = {};
    return rated
      .sort((a, b) => b.rate - a.rate)
      .map(({ entry }) => entry)
      .filter(({ href }) => {
        const page = href.split("#")[0];
        shown[page] = (shown[page] || 0) + 1;
        return shown[page] <= 2;
      })
      .slice(0, limit);
  };

  const CHARACTERS = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
  const escapeHtml = (text) => text.replace(/[&<>"']/g, (character) => CHARACTERS[character]);

  // The part of a text with the most of the words, and the words marked
  const excerpt = (text, question) => {
    const words = readQuestion(question);
    const sources = words.flatMap(({ exact, same }) => [exact.source, ...(same ? [same.source] : [])]);
    const any = new RegExp(sources.join("|"), "gi");
    const places = [...text.matchAll(any)].map((match) => match.index);
    const near = (place) => places.filter((other) => other >= place && other < place + 160).length;
    const best = places.reduce((a, b) => (near(b) > near(a) ? b : a), places[0] || 0);
    const begin = best < 60 ? 0 : text.lastIndexOf(" ", best - 40) + 1;
    const part = text.slice(begin, begin + 220);
    let done = 0;
    let html = "";
    for (const match of part.matchAll(any)) {
      html += `${escapeHtml(part.slice(done, match.index))}<mark>${escapeHtml(match[0])}</mark>`;
      done = match.index + match[0].length;
    }
    return (begin ? "… " : "") + html + escapeHtml(part.slice(done));
  };

  let index = null;
  const load = (offset) => {
    index = index || fetch(`${offset}search.json`).then((answer) => answer.json());
    return index;
  };

  const run = async (box) => {
    const question = box.querySelector("input").value.trim();
    const results = box.querySelector(".smalldocs-search-results");
    results.classList.toggle("show", question.length > 1);
    if (question.length < 2) return;
    const offset = document.querySelector('meta[name="smalldocs:offset"]').content;
    const found = window.searchPages(await load(offset), question);
    if (question !== box.querySelector("input").value.trim()) return; // more was typed in the meantime
    results.innerHTML = found.length
      ? found
          .map(
            (entry) =>
              `<a class="search-result" href="${offset}${escapeHtml(entry.href)}">` +
              `<div class="search-result-title">${escapeHtml(entry.title)}` +
              (entry.section ? ` <span>› ${escapeHtml(entry.section)}</span>` : "") +
              `</div><div class="search-result-text">${excerpt(entry.text, question)}</div></a>`,
          )
          .join("")
      : '<div class="search-none">No page has these words. Try another word, or fewer.</div>';
  };

  const boxOf = (event) => (event.target instanceof Element ? event.target.closest(".smalldocs-search") : null);
  let timer = null;

  // At the window, before the listeners that smalldocs has put at the box
  for (const kind of ["input", "focus"]) {
    window.addEventListener(
      kind,
      (event) => {
        const box = boxOf(event);
        if (!box || !event.target.matches("input")) return;
        event.stopImmediatePropagation();
        clearTimeout(timer);
        timer = setTimeout(() => run(box), kind === "input" ? 120 : 0);
      },
      true,
    );
  }

  window.addEventListener(
    "keydown",
    (event) => {
      const box = boxOf(event);
      if (!box || !["ArrowDown", "ArrowUp", "Enter"].includes(event.key)) return;
      event.stopImmediatePropagation();
      event.preventDefault();
      const items = [...box.querySelectorAll(".search-result")];
      const at = items.findIndex((item) => item.classList.contains("active"));
      if (!items.length) return;
      if (event.key === "Enter") {
        items[Math.max(at, 0)].click();
        return;
      }
      const step = event.key === "ArrowDown" ? 1 : -1;
      const next = at < 0 && step < 0 ? items.length - 1 : (at + step + items.length) % items.length;
      items.forEach((item, i) => {
        item.classList.toggle("active", i === next);
      });
      items[next].scrollIntoView({ block: "nearest" });
    },
    true,
  );
})();
