// The post-mortem's page: each layer's neurons as cells, and what is known of each.
(() => {
  "use strict";
  const { labels: LABELS, bases: BASES } = page.data;
  const { number, colour, packed } = page;
  const GONE = ["dead", "never trained", "no gradient"];
  const DEAD = { proved: "--proved", measured: "--dead", inferred: "--inferred", suspected: "--suspected" };
  const OTHERS = {
    silent: "--silent", "zero row": "--cut", unread: "--cut", idle: "--cut", quiet: "--warn", alive: "--alive", unknown: "--unknown",
  };

  class NeuronMap extends page.Drawing {
    constructor(box, layer, readout) {
      super(box, layer, readout);
      this.ends = [];
      layer.runs.reduce((sum, run) => (this.ends.push(sum + run[2]), sum + run[2]), 0);
    }

    unpack(planes) {
      if (this.hasNeurons) {
        [this.index, this.mask] = [planes.numbers(this.neurons), planes.numbers(this.neurons)];
        [this.deciding, this.dating, this.marks] = [planes.take(this.neurons), planes.take(this.neurons), planes.take(this.neurons)];
      }
      if (this.stepUnit) this.since = planes.numbers(this.marked);
      if (this.hasNumbers) this.numbers = planes.numbers(this.marked, Float32Array);
    }

    // Lay out the cells: as large as a height of 130 pixels allows; if there is no room, neighbours share one.
    lay() {
      const width = this.box.clientWidth;
      this.cell = Math.min(Math.max(Math.floor(Math.sqrt((width * 130) / this.neurons)), 4), 16);
      this.columns = Math.max(Math.floor(width / this.cell), 1);
      const room = this.columns * Math.floor(180 / this.cell);
      this.each = Math.max(1, Math.ceil(this.neurons / room));
      this.cells = Math.ceil(this.neurons / this.each);
      this.height = Math.ceil(this.cells / this.columns) * this.cell;
    }

    run(place) {
      return this.runs[this.ends.findIndex((end) => place < end)];
    }

    draw() {
      if (!this.box.clientWidth) return;
      this.lay();
      const ratio = page.ratio();
      const size = Math.round(this.cell * ratio);
      const [width, height] = [this.columns * size, Math.round((this.height / this.cell) * size)];
      [this.canvas.width, this.canvas.height] = [width, height];
      this.canvas.style.width = `${this.columns * this.cell}px`;
      this.canvas.style.height = `${this.height}px`;
      const context = this.canvas.getContext("2d");
      const image = context.createImageData(width, height);
      const pixels = new Uint32Array(image.data.buffer);
      const surface = packed(colour("--surface"));
      const ink = packed(colour("--ink"));
      const [black, yellow] = [packed([0, 0, 0]), packed([240, 228, 66])];
      pixels.fill(surface);
      const gap = this.cell >= 5 ? Math.max(1, Math.round(ratio)) : 0;
      const colours = this.runs.map(([label, basis]) =>
        packed(colour(GONE.includes(LABELS[label]) ? DEAD[BASES[basis]] : OTHERS[LABELS[label]] ?? "--alarm")));
      let run = 0;
      for (let cell = 0; cell < this.cells; cell++) {
        const place = cell * this.each; // the worst of those that share the cell
        while (place >= this.ends[run]) run += 1;
        const label = LABELS[this.runs[run][0]];
        const [left, top] = [(cell % this.columns) * size, Math.floor(cell / this.columns) * size];
        const marked = (this.marks?.[place] & 1) && size - gap >= 6;
        for (let y = top; y < top + size - gap; y++) {
          for (let x = left; x < left + size - gap; x++) {
            const stripe = (x + y) % 6 < 3;
            let value = colours[run];
            if (label === "not finite") value = stripe ? black : yellow;
            else if (label === "unknown" && stripe) value = surface;
            const middle = (size - gap - 1) / 2;
            if (marked && Math.abs(x - left - middle) <= ratio && Math.abs(y - top - middle) <= ratio) value = ink;
            pixels[y * width + x] = value;
          }
        }
      }
      context.putImageData(image, 0, 0);
      if (this.loaded) this.box.dataset.drawn = "true";
      if (this.at !== null) this.mark();
    }

    start() {
      return 0;
    }

    find(event) {
      if (!this.columns) return null;
      const frame = this.canvas.getBoundingClientRect();
      const column = Math.floor((event.clientX - frame.left) / this.cell);
      const row = Math.floor((event.clientY - frame.top) / this.cell);
      const cell = row * this.columns + column;
      return column >= 0 && column < this.columns && cell >= 0 && cell < this.cells ? cell * this.each : null;
    }

    moves(place) {
      const row = this.columns * this.each;
      return {
        ArrowLeft: place - 1, ArrowRight: place + 1, ArrowUp: place - row, ArrowDown: place + row,
        PageUp: place - 5 * row, PageDown: place + 5 * row, Home: 0, End: this.neurons - 1,
      };
    }

    clamp(place) {
      return Math.min(Math.max(place, 0), this.neurons - 1);
    }

    frame(place) {
      const cell = Math.floor(place / this.each);
      return {
        left: (cell % this.columns) * this.cell - 1, top: Math.floor(cell / this.columns) * this.cell - 1,
        width: this.cell + 3, height: this.cell + 3,
      };
    }

    describe(place) {
      const [label, basis, size] = this.run(place);
      const verdict = BASES[basis] ? `${LABELS[label]}, ${BASES[basis]}` : LABELS[label];
      if (!this.hasNeurons) return `${verdict}: ${number.format(size)} of ${number.format(this.neurons)} neurons`;
      const parts = [`Neuron ${this.index[place]}: ${verdict}`];
      const source = (plane) => this.evidence[plane[place] - 1];
      const decided = source(this.deciding);
      if (decided) parts[0] += ` (${decided[2]})`;
      if (this.numbers && place < this.marked && decided?.[3]) {
        const value = this.numbers[place];
        if (!Number.isNaN(value)) parts.push(`${decided[3]}: ${Number(value.toPrecision(3))}`);
      }
      if (this.since && place < this.marked) {
        const step = this.since[place] - 2;
        const dated = source(this.dating);
        const by = dated && dated !== decided ? ` (${dated[2]}, ${dated[1]})` : "";
        if (step === -1) parts.push(`since the beginning${by}`);
        else if (step >= 0) parts.push(`since ${this.stepUnit > 1 ? "about " : ""}step ${number.format(step)}${by}`);
      }
      const mask = this.mask[place];
      const all = this.evidence.filter((_, at) => (mask >>> at) & 1).filter((one) => one !== decided);
      if (all.length) parts.push(`also: ${all.map(([claim, ground, who]) => `${claim}, ${ground} (${who})`).join("; ")}`);
      if (this.marks[place] & 2) parts.push("woken by an input of the box");
      if (this.marks[place] & 1) parts.push("CONTESTED");
      return parts.join(" · ");
    }

    // Shows what is known of a neuron, so that it stays on the page.
    pick(place) {
      const life = this.box.parentElement.querySelector(".life");
      const button = this.hasNeurons ? [page.copyButton(`Copy index ${this.index[place]}`, [this.index[place]])] : [];
      life.replaceChildren(page.make("p", {}, this.describe(place)), ...button);
      life.hidden = false;
    }

    // Lists of indices to copy: a label's neurons stand side by side.
    lists() {
      if (!this.hasNeurons) return [];
      const found = new Map();
      let from = 0;
      for (const [code, basis, size] of this.runs) {
        const label = !GONE.includes(LABELS[code]) ? LABELS[code] : BASES[basis] === "suspected" ? "suspected" : "dead";
        if (label !== "alive") found.set(label, [...(found.get(label) ?? []), ...this.index.subarray(from, from + size)]);
        from += size;
      }
      return [...found].map(([label, list]) => [`Copy ${number.format(list.length)} ${label}`, list.sort((a, b) => a - b)]);
    }
  }

  page.show(NeuronMap, page.overview());
})();
