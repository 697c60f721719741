// The post-mortem's page: each layer's neurons as a field of cells, and what was said of each.
(() => {
  "use strict";
  const { labels: LABELS, bases: BASES, layers: LAYERS } = JSON.parse(document.getElementById("report-data").textContent);
  const { number, inflate, colour, mix, packed } = page;
  const GONE = ["dead", "never trained", "no gradient"];
  const DEAD = { proved: "--proved", measured: "--dead", inferred: "--inferred", suspected: "--suspected" };
  const OTHERS = { "zero row": "--cut", unread: "--cut", idle: "--cut", quiet: "--warn", alive: "--alive", unknown: "--unknown" };

  class NeuronField {
    constructor(box, layer) {
      Object.assign(this, layer, { box, at: null });
      this.canvas = box.querySelector("canvas");
      this.readout = document.getElementById(`at-${layer.id}`);
      this.ends = [];
      layer.runs.reduce((sum, run) => (this.ends.push(sum + run[2]), sum + run[2]), 0);
      box.addEventListener("pointermove", (event) => this.point(event));
      box.addEventListener("pointerdown", (event) => this.point(event));
      box.addEventListener("pointerleave", () => document.activeElement !== box && this.leave());
      box.addEventListener("keydown", (event) => this.key(event));
      box.addEventListener("focus", () => this.move(this.at ?? 0));
      box.addEventListener("blur", () => this.leave());
    }

    async load() {
      if (this.loading) return this.loading;
      this.draw(); // the runs are at hand; only what is read of one neuron must be unpacked
      this.loading = (this.data ? inflate(this.data) : Promise.resolve(new Uint8Array())).then((bytes) => {
        let offset = 0;
        const take = (length) => bytes.subarray(offset, (offset += length));
        const words = (length) => {
          const planes = take(4 * length);
          const view = new DataView(new ArrayBuffer(4 * length));
          for (let i = 0; i < length; i++) for (let plane = 0; plane < 4; plane++) view.setUint8(4 * i + plane, planes[plane * length + i]);
          return view;
        };
        if (this.hasNeurons) {
          [this.index, this.mask] = [words(this.neurons), words(this.neurons)];
          [this.deciding, this.dating, this.contested] = [take(this.neurons), take(this.neurons), take(this.neurons)];
        }
        if (this.stepUnit) this.since = words(this.told);
        if (this.hasNumbers) this.numbers = words(this.told);
        this.loaded = true;
        this.draw();
      }).catch(() => {
        this.readout.textContent = "This browser cannot unpack the neurons (it lacks DecompressionStream).";
      });
      return this.loading;
    }

    // How the cells lie: as large as a height of 130 pixels allows; where there is no room, neighbours share one.
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
      const ratio = Math.min(devicePixelRatio || 1, 2);
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
        const place = cell * this.each; // the gravest of those that share the cell
        while (place >= this.ends[run]) run += 1;
        const label = LABELS[this.runs[run][0]];
        const [left, top] = [(cell % this.columns) * size, Math.floor(cell / this.columns) * size];
        const marked = this.contested?.[place] && size - gap >= 6;
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

    point(event) {
      if (!this.columns) return;
      const frame = this.canvas.getBoundingClientRect();
      const column = Math.floor((event.clientX - frame.left) / this.cell);
      const row = Math.floor((event.clientY - frame.top) / this.cell);
      const cell = row * this.columns + column;
      if (column >= 0 && column < this.columns && cell >= 0 && cell < this.cells) this.move(cell * this.each);
    }

    key(event) {
      const place = this.at ?? 0;
      const row = this.columns * this.each;
      const moves = {
        ArrowLeft: place - 1, ArrowRight: place + 1, ArrowUp: place - row, ArrowDown: place + row,
        PageUp: place - 5 * row, PageDown: place + 5 * row, Home: 0, End: this.neurons - 1,
      };
      if (event.key === "Escape") this.box.blur();
      if (!(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      this.move(moves[event.key]);
    }

    async move(place) {
      this.at = Math.min(Math.max(place, 0), this.neurons - 1);
      await this.load();
      if (!this.loaded || this.at === null) return;
      this.mark();
      this.readout.textContent = this.describe(this.at);
    }

    mark() {
      if (!this.here) {
        this.here = document.createElement("div");
        this.here.className = "here";
        this.box.append(this.here);
      }
      const cell = Math.floor(this.at / this.each);
      this.here.hidden = false;
      Object.assign(this.here.style, {
        left: `${(cell % this.columns) * this.cell - 1}px`, top: `${Math.floor(cell / this.columns) * this.cell - 1}px`,
        width: `${this.cell + 3}px`, height: `${this.cell + 3}px`,
      });
    }

    leave() {
      this.at = null;
      if (this.here) this.here.hidden = true;
      this.readout.textContent = "";
    }

    describe(place) {
      const [label, basis, size] = this.run(place);
      const verdict = BASES[basis] ? `${LABELS[label]}, ${BASES[basis]}` : LABELS[label];
      if (!this.hasNeurons) return `${verdict}: ${number.format(size)} of ${number.format(this.neurons)} neurons`;
      const said = [`Neuron ${this.index.getUint32(4 * place, true)}: ${verdict}`];
      const source = (plane) => this.evidence[plane[place] - 1];
      const decided = source(this.deciding);
      if (decided) said[0] += ` (${decided[2]})`;
      if (this.numbers && place < this.told && decided?.[3]) {
        const value = this.numbers.getFloat32(4 * place, true);
        if (!Number.isNaN(value)) said.push(`${decided[3]}: ${Number(value.toPrecision(3))}`);
      }
      if (this.since && place < this.told) {
        const step = this.since.getUint32(4 * place, true) - 2;
        const dated = source(this.dating);
        const by = dated && dated !== decided ? ` (${dated[2]}, ${dated[1]})` : "";
        if (step === -1) said.push(`since the beginning${by}`);
        else if (step >= 0) said.push(`since ${this.stepUnit > 1 ? "about " : ""}step ${number.format(step)}${by}`);
      }
      const mask = this.mask.getUint32(4 * place, true);
      const all = this.evidence.filter((_, at) => (mask >>> at) & 1).filter((one) => one !== decided);
      if (all.length) said.push(`also said: ${all.map(([claim, ground, who]) => `${claim}, ${ground} (${who})`).join("; ")}`);
      if (this.contested[place]) said.push("CONTESTED");
      return said.join(" · ");
    }
  }

  const byId = new Map(LAYERS.map((layer) => [String(layer.id), layer]));
  page.show(...[...document.querySelectorAll(".field")].map((box) => new NeuronField(box, byId.get(box.dataset.layer))));
})();
