"use strict";
// Sample answers side by side: search, filters and pages over the packed data of `pages/samples.py`.
(async () => {
  const place = document.getElementById("sample-list");
  if (!place) return;
  const { runs, tasks } = await pivotune.data("samples");
  const { element, chooser } = pivotune;
  const PER_PAGE = 20;
  const FILTERS = {
    "where the answers differ": (answers) => new Set(answers.map(([text]) => text)).size > 1,
    "in another language": (answers) => answers.some(([, , flags]) => flags & 1),
    "empty": (answers) => answers.some(([, , flags]) => flags & 2),
    "where the scores differ": (answers) => new Set(answers.map(([, score]) => score)).size > 1,
  };
  const chosen = { task: Object.keys(tasks)[0], filter: "", words: "", runs: new Set(runs.keys()), page: 0 };

  // An answer's folded text, for a search without upper case and accents.
  const folded = (text) => text.normalize("NFKC").toLocaleLowerCase();
  const texts = (item) => [item[0], item[1], item[2], ...item[3].filter(Boolean).map(([text]) => text)];

  function found() {
    const words = folded(chosen.words);
    return tasks[chosen.task].filter((item) => {
      const answers = item[3].filter((answer, run) => answer && chosen.runs.has(run));
      return answers.length && (!chosen.filter || FILTERS[chosen.filter](answers)) && (!words || texts(item).some((text) => folded(text).includes(words)));
    });
  }

  function answerOf(answer, run) {
    const marks = [];
    if (answer[1] !== null) marks.push(`score ${answer[1]}`);
    if (answer[2] & 1) marks.push("another language");
    if (answer[2] & 2) marks.push("empty");
    return element("div", { className: "answer" }, element("h4", { textContent: runs[run], dir: "auto" }),
      element("p", { className: "text", dir: "auto", textContent: answer[0] || "–" }),
      element("p", { className: answer[2] ? "bad small" : "note small", textContent: marks.join(" · ") }));
  }

  function show() {
    const items = found();
    const pages = Math.max(1, Math.ceil(items.length / PER_PAGE));
    chosen.page = Math.min(chosen.page, pages - 1);
    document.getElementById("sample-count").textContent =
      `${items.length} of ${tasks[chosen.task].length} questions; page ${chosen.page + 1} of ${pages}`;
    place.replaceChildren(...items.slice(chosen.page * PER_PAGE, (chosen.page + 1) * PER_PAGE).map((item) => {
      const heading = element("h3", { className: "small", textContent: item[0], dir: "auto" });
      const question = element("p", { className: "text", dir: "auto", textContent: item[1] });
      const gold = element("p", { className: "text gold", dir: "auto", textContent: item[2] });
      const answers = item[3].flatMap((answer, run) => (answer && chosen.runs.has(run) ? [answerOf(answer, run)] : []));
      return element("article", {}, heading, ...(item[1] ? [question] : []), ...(item[2] ? [element("p", { className: "note small", textContent: "Right answer" }), gold] : []),
        element("div", { className: "answers" }, ...answers));
    }));
    back.disabled = chosen.page === 0;
    next.disabled = chosen.page >= pages - 1;
  }

  function set(name, value) {
    chosen[name] = value;
    chosen.page = 0;
    show();
  }

  const search = element("input", { type: "search", id: "sample-search", autocomplete: "off", dir: "auto" });
  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => set("words", search.value.trim()), 120);
  });
  const ticks = runs.map((name, run) => {
    const tick = element("input", { type: "checkbox", checked: true });
    tick.addEventListener("change", () => {
      chosen.runs[tick.checked ? "add" : "delete"](run);
      set("page", 0);
    });
    return element("label", { dir: "auto" }, tick, name);
  });
  const back = element("button", { type: "button", textContent: "Back" });
  const next = element("button", { type: "button", textContent: "Next" });
  back.addEventListener("click", () => { chosen.page -= 1; show(); });
  next.addEventListener("click", () => { chosen.page += 1; show(); });
  document.getElementById("sample-controls").append(
    chooser("task", Object.keys(tasks), (value) => set("task", value), null),
    chooser("show", Object.keys(FILTERS), (value) => set("filter", value)),
    element("label", {}, "search", search), ...(runs.length > 1 ? ticks : []), back, next);
  show();
})();
