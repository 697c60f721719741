// Maps over the steps, which both pages draw: of all layers, and of the neurons of one.
(() => {
  "use strict";
  const { labels: LABELS, levels: LEVEL, words: WORDS } = page.data;
  const { byId, make, number, percent, colour, mix, packed, niceStep } = page;

  class StepMap extends page.Drawing {
    constructor(box, layer, readout, height = Math.round(Math.min(Math.max(layer.neurons * 4, 28), 180))) {
      super(box, layer, readout);
      this.columns = layer.steps.length;
      this.ticks = box.parentElement.querySelector(".ticks");
      this.height = height;
      this.canvas.style.height = `${this.height}px`;
      const stride = this.columns > 1 ? layer.steps[1] - layer.steps[0] : 1;
      this.edges = [Math.max(layer.steps[0] - stride, -1), ...layer.steps];
    }

    unpack(planes) {
      if (this.hasNeurons) {
        [this.order, this.label, this.fraction] = [planes.numbers(this.neurons), planes.take(this.neurons), planes.take(this.neurons)];
      }
      if (this.hasSteps) [this.died, this.revived] = [planes.numbers(this.neurons), planes.numbers(this.neurons)];
      [this.share, this.rest] = [planes.take(this.rows * this.columns), planes.take(this.rows * this.columns)];
    }

    draw() {
      if (!this.loaded || !this.box.clientWidth) return;
      const ratio = page.ratio();
      const [width, height] = [this.box.clientWidth, this.height].map((size) => Math.round(size * ratio));
      [this.canvas.width, this.canvas.height] = [width, height];
      const context = this.canvas.getContext("2d");
      const image = context.createImageData(width, height);
      const pixels = new Uint32Array(image.data.buffer);
      const [low, high, dead] = ["--low", "--high", "--dead"].map(colour);
      const surface = colour("--surface");
      const palette = Array.from({ length: 256 }, (_, level) => mix(low, high, Math.min(level / LEVEL.max, 1)));
      const verdicts = { silent: "--silent", dormant: "--warn", cut_off: "--cut", dead: "--dead", unseen: "--unknown" };
      for (const [level, name] of Object.entries(verdicts)) palette[LEVEL[level]] = colour(name);
      const [black, yellow, bare] = [packed([0, 0, 0]), packed([240, 228, 66]), packed(surface)];
      const across = this.edges.map((_, column) => Math.round(this.x(column) * width));
      const thick = Math.floor(height / this.rows) >= 6; // room for a hair line between rows
      for (let y = 0; y < height; y++) {
        const from = Math.floor((y * this.rows) / height);
        const to = Math.max(from + 1, Math.floor(((y + 1) * this.rows) / height));
        const gap = thick && Math.floor(((y + 1) * this.rows) / height) > from && y + 1 < height;
        for (let column = 0; column < this.columns; column++) {
          let [share, broken, unseen, others] = [0, false, 0, 0];
          const sum = [0, 0, 0];
          for (let row = from; row < to; row++) {
            const level = this.rest[row * this.columns + column];
            share += this.share[row * this.columns + column] / 255 / (to - from);
            broken ||= level === LEVEL.not_finite;
            if (level === LEVEL.dead) continue;
            unseen += level === LEVEL.unseen;
            others += 1;
            for (let i = 0; i < 3; i++) sum[i] += palette[level][i];
          }
          // The share of dead shows however small it is: a mean would let one dead neuron in a hundred vanish.
          const rest = others ? sum.map((value) => value / others) : dead;
          const flat = packed(mix(rest, dead, share > 0 ? this.tint(share) : 0));
          const hatched = others > 0 && unseen === others && share === 0;
          for (let x = across[column]; x < across[column + 1]; x++) {
            const stripe = (x + y) % Math.round(8 * ratio) < 4 * ratio;
            let value = flat;
            if (broken) value = stripe ? black : yellow;
            else if (hatched) value = stripe ? flat : bare;
            pixels[y * width + x] = gap ? bare : value;
          }
        }
      }
      context.putImageData(image, 0, 0);
      this.drawTicks();
      this.box.dataset.drawn = "true";
      if (this.at !== null) this.mark();
    }

    // How much of the colour of the dead a share of them gives.
    tint(share) {
      return Math.max(share, 0.45);
    }

    // Where a column's left edge lies, 0 to 1, on the true axis of steps.
    x(column) {
      const [first, last] = [this.edges[0], this.edges[this.columns]];
      return (this.edges[column] - first) / (last - first || 1);
    }

    drawTicks() {
      const [first, last] = [this.edges[0], this.edges[this.columns]];
      const step = niceStep(last - first, this.box.clientWidth < 480 ? 3 : 7);
      const values = [this.columns > 1 ? first + 1 : last];
      for (let value = Math.ceil(first / step) * step; this.columns > 1 && value < last; value += step) {
        if (value > first + step * 0.4 && value < last - step * 0.6) values.push(value);
      }
      if (this.columns > 1) values.push(last);
      this.ticks.replaceChildren(...values.map((value, i) => {
        const tick = document.createElement("span");
        tick.textContent = (i === 0 ? "step " : "") + number.format(value);
        tick.style.left = i === 0 ? "0" : `${(100 * (value - first)) / (last - first || 1)}%`;
        return tick;
      }));
    }

    start() {
      return [0, this.columns - 1];
    }

    find(event) {
      const frame = this.canvas.getBoundingClientRect();
      const x = Math.min(Math.max((event.clientX - frame.left) / frame.width, 0), 1);
      const y = Math.min(Math.max((event.clientY - frame.top) / frame.height, 0), 0.999999);
      let column = 0;
      while (column < this.columns - 1 && this.x(column + 1) <= x) column += 1;
      return [Math.floor(y * this.neurons), column];
    }

    moves([place, column]) {
      const page = Math.max(1, Math.round(this.neurons / 10));
      return {
        ArrowUp: [place - 1, column], ArrowDown: [place + 1, column], ArrowLeft: [place, column - 1], ArrowRight: [place, column + 1],
        PageUp: [place - page, column], PageDown: [place + page, column], Home: [place, 0], End: [place, this.columns - 1],
      };
    }

    clamp([place, column]) {
      return [Math.min(Math.max(place, 0), this.neurons - 1), Math.min(Math.max(column, 0), this.columns - 1)];
    }

    frame([place, column]) {
      const tall = Math.max(this.height / this.neurons, 4);
      const wide = Math.max((this.x(column + 1) - this.x(column)) * this.box.clientWidth, 4);
      return {
        left: this.x(column) * this.box.clientWidth - 2, width: wide + 4,
        top: ((place + 0.5) * this.height) / this.neurons - tall / 2 - 2, height: tall + 4,
      };
    }

    describe([place, column]) {
      const row = Math.floor(((place + 1) * this.rows - 1) / this.neurons);
      const from = Math.floor((row * this.neurons) / this.rows);
      const size = Math.floor(((row + 1) * this.neurons) / this.rows) - from;
      const [share, rest] = [this.share, this.rest].map((plane) => plane[row * this.columns + column]);
      const parts = [];
      if (this.hasNeurons) {
        const label = LABELS[this.label[place]];
        const fraction = this.fraction[place];
        parts.push(`Neuron ${this.order[place]}: ${label}`);
        if (fraction <= LEVEL.max && label !== "unseen") parts.push(`zero at ${percent(fraction / LEVEL.max)} of positions`);
        if (this.hasSteps) {
          if (this.died[place] > 0) parts.push(`died at step ${number.format(this.died[place] - 1)}`);
          else if (label === "dead") parts.push("no death seen: dead from the start");
          if (this.revived[place] > 0) parts.push(`revived at step ${number.format(this.revived[place] - 1)}`);
        }
      }
      const step = `at step ${number.format(this.steps[column])}`;
      const others = rest === LEVEL.dead ? "" : this.level(rest, size > 1);
      if (size === 1) parts.push(`${step}: ${share ? "dead" : others}`);
      else if (share === 255) parts.push(`${step}: all ${size} neurons of this row dead`);
      else parts.push(`${step}: ${share ? percent(share / 255) : "none"} of the ${size} neurons of this row dead, the rest ${others}`);
      return parts.join(" · ");
    }

    level(level, several) {
      for (const name of ["unseen", "silent", "dormant", "cut_off", "not_finite"]) {
        if (level === LEVEL[name]) return (several ? (name === "not_finite" ? "partly " : "mostly ") : "") + (WORDS[name] ?? name.replace("_", " "));
      }
      if (WORDS.alive) return WORDS.alive;
      return `zero at ${percent(level / LEVEL.max)} of positions${several ? " on average" : ""}`;
    }

    // Shows the life of a neuron (or of those that share its row) over the steps: how often its output was zero, and its dates.
    pick([place]) {
      const row = Math.floor(((place + 1) * this.rows - 1) / this.neurons);
      const svg = (tag, attributes, ...children) => {
        const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
        for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
        element.append(...children);
        return element;
      };
      const bars = { dead: "", rest: "" };
      for (let column = 0; column < this.columns; column++) {
        const [share, rest] = [this.share, this.rest].map((plane) => plane[row * this.columns + column]);
        const zero = Math.max(share / 255, rest <= LEVEL.max ? rest / LEVEL.max : 0);
        const [left, right] = [this.x(column), this.x(column + 1)].map((x) => (1000 * x).toFixed(1));
        bars[share ? "dead" : "rest"] += `M${left} 40V${(40 - 40 * zero).toFixed(1)}H${right}V40z`;
      }
      const life = this.box.parentElement.querySelector(".life");
      const several = this.rows < this.neurons ? " (this row of the map)" : "";
      const indices = this.hasNeurons ? [page.copyButton(`Copy index ${this.order[place]}`, [this.order[place]])] : [];
      const text = this.describe([place, this.columns - 1]);
      life.replaceChildren(
        make("p", {}, text),
        svg("svg", { viewBox: "0 0 1000 40", preserveAspectRatio: "none", role: "img", "aria-label": `Zero outputs over the steps${several}` },
          svg("path", { class: "rest", d: bars.rest }), svg("path", { class: "dead", d: bars.dead })),
        make("p", { className: "hint" }, `Height: the share of zero outputs in each window${several}, from step ${number.format(Math.max(this.edges[0], 0))} to ${number.format(this.edges[this.columns])}.`),
        ...indices,
      );
      life.hidden = false;
    }

    // Lists of indices to copy.
    lists() {
      if (!this.hasNeurons) return [];
      return ["dead", "silent", "dormant", "cut off", "not finite"].map((label) => {
        const code = LABELS.indexOf(label);
        const found = [...this.order].filter((_, place) => this.label[place] === code).sort((a, b) => a - b);
        return [`Copy ${number.format(found.length)} ${label}`, found];
      }).filter(([, found]) => found.length);
    }
  }

  // The map of the whole network: a row for each layer, in the order in which they ran.
  class Overview extends StepMap {
    unpack(planes) {
      const cells = this.rows * this.columns;
      this.sizes = planes.numbers(this.rows);
      this.dead = planes.numbers(cells);
      this.rest = planes.take(cells);
      this.share = this.dead.map((dead, cell) => (dead ? Math.max(Math.floor((255 * dead) / this.sizes[Math.floor(cell / this.columns)]), 1) : 0));
      this.names = JSON.parse(new TextDecoder().decode(planes.bytes.subarray(planes.offset)));
    }

    tint(share) {
      return 0.2 + 0.8 * share; // layers are compared by it
    }

    start() {
      return [Math.max(this.layers.indexOf(page.data.worst), 0), this.columns - 1];
    }

    describe([row, column]) {
      const [dead, rest] = [this.dead, this.rest].map((plane) => plane[row * this.columns + column]);
      const size = this.sizes[row];
      const others = rest === LEVEL.dead ? "" : `, the rest ${this.level(rest, true)}`;
      const where = `${this.names[row]} at step ${number.format(this.steps[column])}`;
      if (rest === LEVEL.unseen && !dead) return `${where}: ${WORDS.unseen ?? "not observed"}`;
      return `${where}: ${number.format(dead)} of ${number.format(size)} dead (${percent(dead / size)})${others}`;
    }

    pick([row]) {
      if (this.layers[row] >= 0) page.choose(this.layers[row], true);
      else this.readout.textContent = `${this.names[row]} has no row in the table below: see the sentence there.`;
    }
  }

  // The map of all layers, if the page has one, with names beside it if there is room.
  const overview = () => {
    const [box, names] = [byId("overview"), byId("overview-names")];
    if (!box) return undefined;
    const height = Math.round(Math.min(Math.max(page.data.overview.rows * 13, 39), 170));
    const made = (box.drawing = new Overview(box, page.data.overview, byId("at-overview"), height));
    made.load(); // its names are unpacked with it
    if (made.rows > 13) return made;
    page.bytesOf(page.data.overview).then(() => {
      names.replaceChildren(...made.names.map((name) => make("span", { title: name }, name)));
      names.style.height = `${height}px`;
      names.hidden = false;
    });
    return made;
  };

  Object.assign(page, { StepMap, overview });
})();
