"use strict";
// The grid of the lens explorer. Text from data is written with `textContent`.
(async () => {
  const { data, element, chooser } = pivotune;
  const { models, items } = await data("explored");
  const place = Object.fromEntries(["choices", "read", "grids", "legend", "cell", "likeliest", "ask", "state"]
    .map((id) => [id, document.getElementById(id)]));
  const DIFFERENCE = "difference";
  const COLOURS = {
    probability: "From 0 to 1: probability of the likeliest token.",
    entropy: "From 0 to the largest of this text: entropy in nats.",
    language: "Orange: tokens of ASCII letters. Blue: tokens with other letters. Each from probability 0 to 1.",
    agreement: "From 0 to 1: probability of the output's likeliest token. Bold: the same token as the output.",
  };
  const CHANGES = {
    "KL divergence": "From 0 to the largest of this text: KL divergence between the distributions of the two models, in nats.",
    "probability change": `Blue: the likeliest token of ${models[0]} is more probable there than in ${models[1]}. Orange: less.`,
  };
  const chosen = { item: 0, model: "0", lens: "logit", colour: "probability", change: "KL divergence", english: false };

  const percent = (p) => (p >= 0.9995 ? "100 %" : p < 0.0005 ? "<0.1 %" : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`);
  // White space that is seen.
  const seen = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^\s+$/, (blanks) => "␣".repeat(blanks.length));
  const isDifference = () => chosen.model === DIFFERENCE;

  // What a side holds for the models that are shown: one, or both for a difference.
  function shownGrids(side) {
    return (isDifference() ? [0, 1] : [Number(chosen.model)]).map((model) => side.grids[model][chosen.lens]);
  }
  const token = (side, grid, at, rank = 0) => side.texts[grid.likeliest[at][rank]];
  const probability = (grid, at, rank = 0) => grid.probabilities[at * grid.likeliest[0].length + rank];

  // [class of the hue, strength from 0 to 1]; `most` is the largest entropy or divergence of the grid.
  function colour(side, grid, at, most) {
    if (isDifference()) {
      const { kl, change } = side.differences[chosen.lens];
      if (chosen.change === "KL divergence") return ["blue", kl[at] / most];
      return [change[at] < 0 ? "orange" : "blue", Math.abs(change[at])];
    }
    if (chosen.colour === "probability") return ["blue", probability(grid, at)];
    if (chosen.colour === "entropy") return ["blue", grid.entropy[at] / most];
    if (chosen.colour === "agreement") return ["blue", grid.output[at]];
    const [ascii, other] = grid.letters.slice(2 * at, 2 * at + 2);
    return ascii > other ? ["orange", ascii] : ["blue", other];
  }

  // Where a cell is, then its figures.
  function describe(side, at) {
    const layer = Math.floor(at / side.positions), position = at % side.positions;
    const parts = [`Layer ${layer}, after “${seen(columnOf(side, position))}”`];
    for (const [index, grid] of shownGrids(side).entries()) {
      const name = isDifference() ? `${models[index]}: ` : "";
      parts.push(`${name}“${seen(token(side, grid, at))}” ${percent(probability(grid, at))}`, `entropy ${grid.entropy[at].toFixed(2)} nats`);
      if (!isDifference()) parts.push(`output's token ${percent(grid.output[at])}`,
        `ASCII letters ${percent(grid.letters[2 * at])}, other letters ${percent(grid.letters[2 * at + 1])}`);
    }
    if (isDifference()) {
      const { kl, change } = side.differences[chosen.lens];
      parts.push(`KL ${kl[at].toFixed(3)} nats`, `change ${change[at] < 0 ? "−" : "+"}${percent(Math.abs(change[at]))}`);
    }
    return parts;
  }

  function columnOf(side, position) {
    for (const [text, span] of side.columns) {
      if (position < span) return text;
      position -= span;
    }
    return "";
  }

  function open(side, at) {
    const grids = shownGrids(side);
    const [where, ...figures] = describe(side, at);
    document.getElementById("likeliest-title").textContent = where;
    const names = isDifference() ? models : [models[Number(chosen.model)]];
    const head = element("tr", {}, element("th", { scope: "col", textContent: "rank" }),
      ...names.flatMap((name) => [element("th", { scope: "col", textContent: name, dir: "auto" }), element("th", { scope: "col", textContent: "probability" })]));
    const rows = grids[0].likeliest[at].map((_, rank) => element("tr", {}, element("th", { scope: "row", textContent: rank + 1 }),
      ...grids.flatMap((grid) => {
        const bar = element("td", { className: "bar blue", textContent: percent(probability(grid, at, rank)) });
        bar.style.setProperty("--strength", probability(grid, at, rank));
        return [element("td", { textContent: seen(token(side, grid, at, rank)), dir: "auto" }), bar];
      })));
    place.likeliest.querySelector(".scroll").replaceChildren(
      element("table", {}, element("caption", { textContent: figures.join(" · ") }), element("thead", {}, head), element("tbody", {}, ...rows)));
    place.likeliest.showModal();
  }

  function table(side, name) {
    const grids = shownGrids(side), layers = grids[0].likeliest.length / side.positions - 1;
    const label = `Lens of the ${name === "text" ? "text" : "English parallel"}: layers by tokens`;
    const head = element("tr", {}, element("th", { scope: "col", textContent: "layer" }), ...side.columns.map(([text, span, role]) =>
      element("th", { scope: "col", colSpan: span, className: role, dir: "auto", title: `${text} (${role})`, textContent: seen(text) })));
    const most = (isDifference() ? side.differences[chosen.lens].kl : grids[0].entropy).reduce((a, b) => Math.max(a, b), 1e-9);
    const cells = [];
    const body = [];
    for (let layer = layers; layer >= 0; layer--) {
      const row = element("tr", {}, element("th", { scope: "row", dir: "ltr", textContent: layer === layers ? `${layer} output` : layer }));
      for (let position = 0; position < side.positions; position++) {
        const at = layer * side.positions + position;
        const [hue, strength] = colour(side, grids[0], at, most);
        const top = token(side, grids[0], at);
        const cell = element("td", { className: hue, tabIndex: -1, dir: "auto" }, element("span", { textContent: seen(top) }));
        cell.style.setProperty("--strength", strength);
        cell.dataset.at = at;
        if (isDifference() && token(side, grids[1], at) !== top) {
          cell.append(element("small", { textContent: seen(token(side, grids[1], at)) }));
        }
        const isOutputs = top === token(side, grids[0], layers * side.positions + position);
        cell.classList.toggle("same", chosen.colour === "agreement" && !isDifference() && isOutputs);
        cells[at] = cell;
        row.append(cell);
      }
      body.push(row);
    }
    const grid = element("table", { className: "lens", dir: side.rtl ? "rtl" : "ltr" },
      element("thead", {}, head), element("tbody", {}, ...body));
    grid.setAttribute("role", "grid");
    grid.setAttribute("aria-label", label);
    let active = cells[layers * side.positions];
    active.tabIndex = 0;
    const pointed = (event) => { const cell = event.target.closest("td"); return cell && Number(cell.dataset.at); };
    const tell = (at) => { place.cell.textContent = describe(side, at).join(" · "); };
    grid.addEventListener("pointerover", (event) => { const at = pointed(event); if (at != null) tell(at); });
    grid.addEventListener("focusin", (event) => {
      const at = pointed(event);
      if (at == null) return;
      active.tabIndex = -1;
      active = cells[at];
      active.tabIndex = 0;
      tell(at);
    });
    grid.addEventListener("click", (event) => { const at = pointed(event); if (at != null) { cells[at].focus(); open(side, at); } });
    grid.addEventListener("keydown", (event) => {
      const at = pointed(event);
      if (at == null) return;
      const position = at % side.positions, first = at - position, forward = side.rtl ? "ArrowLeft" : "ArrowRight";
      const steps = {
        ArrowUp: at + side.positions, ArrowDown: at - side.positions, Home: first, End: first + side.positions - 1,
        ArrowLeft: position + (forward === "ArrowLeft" ? 1 : -1), ArrowRight: position + (forward === "ArrowRight" ? 1 : -1),
      };
      if (event.key === "Enter" || event.key === " ") open(side, at);
      else if (event.key in steps) {
        let next = steps[event.key];
        if (event.key === "ArrowLeft" || event.key === "ArrowRight") next = next < 0 || next >= side.positions ? -1 : first + next;
        cells[next]?.focus();
      } else return;
      event.preventDefault();
    });
    const texts = element("p", { className: "texts" }, ...["prompt", "answer"].flatMap((part) =>
      [element("strong", { textContent: `${part[0].toUpperCase()}${part.slice(1)}: ` }), element("bdi", { className: "text", textContent: side[part] }), " "]));
    const region = element("div", { className: "scroll lens-scroll", dir: grid.dir }, grid);
    return element("div", { className: "side" }, element("h3", { textContent: name === "text" ? "Text" : "English parallel" }), texts, region);
  }

  function draw() {
    const item = items[chosen.item];
    if (!item) return;
    const sides = item.sides.filter((side, index) => index === 0 || chosen.english);
    place.read.textContent = [...item.notes,
      ...sides.slice(0, 1).filter((side) => side.hidden).map((side) => `${side.hidden} tokens of the template before the prompt are read and not shown`)].join(" · ");
    place.grids.replaceChildren(...sides.map((side) => table(side, side.name)));
    place.legend.textContent = `Colour. ${isDifference() ? CHANGES[chosen.change] : COLOURS[chosen.colour]}` +
      (isDifference() ? ` A second token below is that of ${models[1]}.` : "");
    place.cell.textContent = place.cell.dataset.hint ??= place.cell.textContent;
  }

  // A list of [value, text] choices.
  function list(label, key, values) {
    const made = chooser(label, values.map(([value]) => value), (value) => { chosen[key] = value; controls(); draw(); }, null);
    const select = made.querySelector("select");
    values.forEach(([, text], index) => { select.options[index].textContent = text; });
    select.value = chosen[key];
    select.name = key;
    return made;
  }

  function controls() {
    const item = items[chosen.item];
    const named = document.activeElement?.name;
    const made = [];
    if (items.length > 1) made.push(list("Text", "item", items.map((one, index) => [String(index), one.label])));
    if (models.length > 1) made.push(list("Model", "model", [...models.map((name, index) => [String(index), name]), [DIFFERENCE, "difference"]]));
    const lenses = item ? Object.keys(item.sides[0].grids[0]) : [];
    if (lenses.length > 1) made.push(list("Lens", "lens", lenses.map((name) => [name, name])));
    if (item) {
      made.push(isDifference() ? list("Colour by", "change", Object.keys(CHANGES).map((name) => [name, name]))
        : list("Colour by", "colour", Object.keys(COLOURS).map((name) => [name, name])));
    }
    if (item?.sides.length > 1) {
      const box = element("input", { type: "checkbox", checked: chosen.english, name: "english" });
      box.addEventListener("change", () => { chosen.english = box.checked; draw(); });
      made.push(element("label", {}, box, "English parallel"));
    }
    place.choices.replaceChildren(...made);
    if (named) place.choices.querySelector(`[name="${CSS.escape(named)}"]`)?.focus();
  }

  place.ask?.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = place.ask.querySelector("button");
    const fields = new FormData(place.ask);
    button.disabled = true;
    place.state.textContent = "The model is reading…";
    try {
      const answer = await fetch("read", { method: "POST", headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ prompt: fields.get("prompt"), english: fields.get("english"), model: Number(fields.get("model")) }) });
      const found = await answer.json();
      if (found.error) throw new Error(found.error);
      items.push(found);
      Object.assign(chosen, { item: items.length - 1, english: found.sides.length > 1 });
      if (!isDifference()) chosen.model = String(fields.get("model"));
      place.state.textContent = "";
      controls();
      draw();
    } catch (error) {
      place.state.textContent = error instanceof TypeError ? "The server does not answer; is it still running?" : error.message;
    } finally {
      button.disabled = false;
    }
  });

  if (items.length && "tuned" in items[0].sides[0].grids[0]) chosen.lens = "tuned";
  if (items.length) chosen.english = items[0].sides.length > 1 && matchMedia("(min-width: 60rem)").matches;
  controls();
  draw();
  document.documentElement.dataset.explored = "";
})();
