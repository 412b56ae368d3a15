"use strict";
// What every page has: packed data, the theme, and charts with controls. Text from data is written with `textContent`.
window.pivotune = (() => {
  // Fields of a chart's data that a reader may choose by; `all` shows every value.
  const CHOICES = ["run", "model", "language", "task", "benchmark", "metric", "term", "lens"];
  const WIDTH = 640; // of the panels as they are described in Python

  async function data(id) {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  }

  function element(name, properties = {}, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }

  // A labelled list of choices; `change` is called with the chosen value.
  function chooser(label, values, change, all = "all") {
    const list = element("select", {}, ...(all === null ? [] : [element("option", { value: "", textContent: all })]),
      ...values.map((value) => element("option", { value, textContent: value })));
    list.addEventListener("change", () => change(list.value));
    return element("label", {}, label, list);
  }

  async function draw(figure) {
    const { title, ...spec } = await data(`${figure.id}-spec`); // the title stands above, as text that wraps
    const chart = figure.querySelector(".chart"), controls = figure.querySelector(".controls");
    const rows = spec.datasets ?? {};
    const chosen = {};
    let view = null, shownWidth = 0, beside = 90;

    async function embed() {
      const datasets = Object.fromEntries(Object.entries(rows).map(([name, all]) => [name,
        all.filter((row) => Object.entries(chosen).every(([field, value]) => !(field in row) || !value || row[field] === value))]));
      shownWidth = chart.clientWidth;
      const axis = { ...spec.config?.axis, labelLimit: Math.min(260, 0.4 * shownWidth) };
      const columns = Math.max(1, Math.floor(shownWidth / 330));
      const legend = { ...spec.config?.legend, columns, labelLimit: shownWidth / columns - 80 };
      // Axes take their place beside the panels: what they took the first time is left free the second time.
      for (let attempt = 0; attempt < 3; attempt++) {
        const width = Math.max(120, Math.min(shownWidth - beside, 900));
        view?.finalize();
        view = await vegaEmbed(chart,
          { ...structuredClone(spec), datasets, ...resized(spec, width / WIDTH),
            config: { ...spec.config, axis, legend, title: { ...spec.config?.title, limit: width } } },
          // Errors only: a choice may leave a panel empty, of which Vega warns.
          { ast: true, renderer: "svg", actions: false, defaultStyle: false, logLevel: 1, tooltip: { disableDefaultStyle: true } });
        const excess = chart.querySelector("svg").getBoundingClientRect().width - shownWidth;
        if (excess <= 0) break;
        beside = shownWidth - width + excess + 2;
      }
    }

    const fields = CHOICES.filter((field) => !(spec.usermeta?.fixed ?? []).includes(field));
    for (const field of fields) {
      const values = [...new Set(Object.values(rows).flat().map((row) => row[field]).filter((value) => typeof value === "string"))];
      if (values.length < 2) continue;
      controls.append(chooser(field, values, (value) => { chosen[field] = value; embed(); }));
    }
    if (zoomable(spec)) {
      const reset = element("button", { type: "button", textContent: "Reset zoom" });
      reset.addEventListener("click", embed);
      controls.append(element("span", { className: "note zoom" }, "Ctrl and the wheel zoom, dragging moves, a double click resets. ", reset));
    }
    await embed();
    let waiting = 0;
    new ResizeObserver(() => {
      if (Math.abs(chart.clientWidth - shownWidth) < 8) return;
      clearTimeout(waiting);
      waiting = setTimeout(embed, 150);
    }).observe(chart);
  }

  // Bind the scales of each panel with two axes of numbers to the pointer; returns true if there is one. Only here: files have no
  // pointer. The wheel zooms with Ctrl alone, and fingers do not move a panel, so that the page scrolls on over it.
  function zoomable(spec) {
    let found = false;
    for (const [place, panel] of (spec.vconcat ?? []).entries()) {
      const units = (part) => part.layer?.flatMap(units) ?? [part];
      const unit = units(panel).find(({ encoding }) => encoding?.x?.type === "quantitative" && encoding.y?.type === "quantitative");
      if (!unit) continue;
      const encodings = found && spec.resolve?.scale?.x === "shared" ? ["y"] : ["x", "y"]; // one panel moves a shared axis
      const select = { type: "interval", encodings, zoom: "wheel![event.ctrlKey]", translate:
        "[pointerdown[event.pointerType === 'mouse'], window:pointerup] > window:pointermove!" };
      // A bound scale cuts marks off at its ends.
      for (const axis of ["x", "y"]) unit.encoding[axis].scale = { padding: 5, nice: false, ...unit.encoding[axis].scale };
      unit.params = [{ name: `zoom_${place}`, select, bind: "scales" }];
      found = true;
    }
    return found;
  }

  // The widths of all panels, scaled.
  function resized(spec, scale) {
    const changed = {};
    if (typeof spec.width === "number") changed.width = Math.round(spec.width * scale);
    for (const key of ["vconcat", "hconcat", "concat", "layer"]) {
      if (spec[key]) changed[key] = spec[key].map((one) => ({ ...structuredClone(one), ...resized(one, scale) }));
    }
    if (spec.spec) changed.spec = { ...structuredClone(spec.spec), ...resized(spec.spec, scale) };
    return changed;
  }

  document.getElementById("theme").addEventListener("change", (event) => {
    document.documentElement.dataset.theme = event.target.value;
  });
  const drawn = (async () => {
    for (const figure of document.querySelectorAll("figure[id]")) {
      await draw(figure);
      await new Promise((next) => setTimeout(next)); // the page answers between two charts
    }
    document.documentElement.dataset.drawn = "";
  })();
  return { data, element, chooser, drawn };
})();
