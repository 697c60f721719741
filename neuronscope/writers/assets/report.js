// The report page: each layer's map of neurons over steps, and the comparison of two steps.
(() => {
  "use strict";
  const { layers: LAYERS } = page.data;
  for (const layer of LAYERS) {
    if (!("data" in layer)) continue;
    [layer.steps, layer.lost] = [page.data.steps[layer.steps], page.data.lost[layer.lost]];
  }
  const { byId, make, number } = page;

  // Who died between two steps: from the steps of death of single neurons where the page has them.
  const compare = async (overview) => {
    const [from, to] = ["from", "to"].map((id) => Number(byId(id).value)).sort((a, b) => a - b);
    const rows = [];
    let [died, revived] = [0, 0];
    for (const layer of LAYERS.filter((each) => "data" in each)) {
      await page.bytesOf(layer);
      const planes = new page.Planes(layer.bytes);
      const row = overview.layers.indexOf(layer.id);
      const at = (column) => overview.dead[row * overview.columns + column];
      const [before, after] = [at(from), at(to)];
      let names = null;
      let back = null;
      if (layer.hasSteps) {
        const [order] = [planes.numbers(layer.neurons), planes.take(2 * layer.neurons)];
        const within = (steps) => [...order].filter((_, place) => steps[place] - 1 > overview.steps[from] && steps[place] - 1 <= overview.steps[to]).sort((a, b) => a - b);
        [names, back] = [within(planes.numbers(layer.neurons)), within(planes.numbers(layer.neurons))];
      }
      if (before === after && !names?.length && !back?.length) continue;
      died += names?.length ?? Math.max(after - before, 0);
      revived += back?.length ?? Math.max(before - after, 0);
      rows.push([overview.names[row], before, after, names, back]);
    }
    rows.sort((a, b) => (b[3]?.length ?? b[2] - b[1]) - (a[3]?.length ?? a[2] - a[1]));
    const steps = [from, to].map((column) => number.format(overview.steps[column]));
    const list = (found) => (!found ? ["–"] : found.length ? [page.copyButton(`Copy ${number.format(found.length)}`, found), ` ${found.slice(0, 6).join(", ")}${found.length > 6 ? " …" : ""}`] : ["·"]);
    const cell = (tag, className, ...children) => make(tag, { className }, ...children);
    const heading = ["Layer", `Dead at ${steps[0]}`, `Dead at ${steps[1]}`, "Died between", "Revived between"];
    byId("between").replaceChildren(
      make("p", {}, `Between steps ${steps[0]} and ${steps[1]}, ${number.format(died)} died and ${number.format(revived)} revived, in ${number.format(rows.length)} layers${rows.length > 40 ? ", of which the 40 with the most deaths are listed" : ""}.`),
      ...(rows.length ? [make("div", { className: "scroll" }, make("table", {},
        make("thead", {}, make("tr", {}, ...heading.map((text, i) => Object.assign(cell("th", i === 1 || i === 2 ? "n" : "", text), { scope: "col" })))),
        make("tbody", {}, ...rows.slice(0, 40).map(([name, before, after, names, back]) => make("tr", {},
          Object.assign(cell("th", "", name), { scope: "row" }), cell("td", "n", number.format(before)), cell("td", "n", number.format(after)),
          cell("td", "words", ...list(names)), cell("td", "words", ...list(back)))))))] : []),
    );
    page.rove(byId("between"), "button", "ArrowUp", "ArrowDown");
  };

  const overview = page.overview();
  page.show(page.StepMap, overview);
  if (!overview) return;
  if (overview.columns > 1) {
    const options = () => overview.steps.map((step, column) => make("option", { value: column, textContent: number.format(step) }));
    byId("from").append(...options());
    byId("to").append(...options());
    byId("to").value = overview.columns - 1;
    byId("compare").hidden = false;
    const again = () => byId("compare").open && page.bytesOf(page.data.overview).then(() => compare(overview));
    for (const id of ["from", "to"]) byId(id).addEventListener("change", again);
    byId("compare").addEventListener("toggle", again);
  }
})();
