// The report page: each layer's map of neurons over steps.
(() => {
  "use strict";
  const { labels: LABELS, levels: LEVEL, layers: LAYERS } = JSON.parse(document.getElementById("report-data").textContent);
  const { number, percent, colour, mix, packed, niceStep } = page;

  class StepMap extends page.Drawing {
    constructor(box, layer) {
      super(box, layer);
      this.columns = layer.steps.length;
      this.ticks = box.parentElement.querySelector(".ticks");
      this.height = Math.round(Math.min(Math.max(layer.neurons * 4, 28), 180));
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
      const ratio = Math.min(devicePixelRatio || 1, 2);
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
          const flat = packed(mix(rest, dead, share > 0 ? Math.max(share, 0.45) : 0));
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
        if (level === LEVEL[name]) return (several ? (name === "not_finite" ? "partly " : "mostly ") : "") + name.replace("_", " ");
      }
      return `zero at ${percent(level / LEVEL.max)} of positions${several ? " on average" : ""}`;
    }
  }

  page.show(StepMap, LAYERS);
})();
