// What both pages share: numbers as text, the theme, sorting the table, and drawings that are read by pointer and keyboard.
const page = (() => {
  "use strict";
  const root = document.documentElement;
  const number = new Intl.NumberFormat("en");
  const percent = (share) => {
    const value = 100 * share;
    if (value > 0 && value < 0.1) return "< 0.1 %";
    if (value > 99.9 && value < 100) return "> 99.9 %";
    return `${(value > 0 && value < 9.95) || (value >= 99.5 && value < 100) ? value.toFixed(1) : value.toFixed(0)} %`;
  };

  const drawings = [];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const themeButton = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const remembered = (value) => {
    try {
      if (value) localStorage.setItem("neuronscope-theme", value);
      return localStorage.getItem("neuronscope-theme");
    } catch {
      return null; // storage is denied: the choice lasts as long as the page
    }
  };
  const showTheme = () => {
    themeButton.textContent = isDark() ? "Light" : "Dark";
    themeButton.setAttribute("aria-label", `${themeButton.textContent} theme`);
    drawings.forEach((drawing) => drawing.draw());
  };

  const sortBy = (table, column, heading) => {
    const numeric = heading.dataset.type === "number";
    const first = numeric && column > 0 ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const direction = heading.getAttribute("aria-sort") === first ? other : first;
    table.querySelectorAll("th[aria-sort]").forEach((th) => th.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const key = (row) => (numeric ? row.cells[column].dataset.key : row.cells[column].textContent.trim());
    const compare = (a, b) => {
      if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === ""); // not measured stays last
      return sign * (numeric ? key(a) - key(b) : key(a).localeCompare(key(b), "en", { numeric: true }));
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    document.getElementById("sorted").textContent = `Sorted by ${heading.textContent.trim()}, ${direction}.`;
  };

  const inflate = async (text) => {
    const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };
  const colour = (name) => {
    const hex = getComputedStyle(root).getPropertyValue(name).trim();
    return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  };
  const mix = (a, b, share) => a.map((value, i) => value + (b[i] - value) * share);
  const packed = ([r, g, b]) => (255 << 24 | Math.round(b) << 16 | Math.round(g) << 8 | Math.round(r)) >>> 0;
  const niceStep = (span, most) => {
    const raw = Math.max(span / most, 1);
    const power = 10 ** Math.floor(Math.log10(raw));
    return power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  };

  // Reads the planes of unpacked bytes one after another.
  class Planes {
    constructor(bytes) {
      Object.assign(this, { bytes, offset: 0 });
    }

    take(length) {
      return this.bytes.subarray(this.offset, (this.offset += length));
    }

    // Numbers of four bytes, stored as four planes, lowest byte first.
    numbers(length, Kind = Uint32Array) {
      const planes = this.take(4 * length);
      const bytes = new Uint8Array(4 * length);
      for (let i = 0; i < length; i++) for (let plane = 0; plane < 4; plane++) bytes[4 * i + plane] = planes[plane * length + i];
      return new Kind(bytes.buffer);
    }
  }

  // A drawing of a layer. A subclass has `unpack`, `draw`, `find` (the place at a pointer), `moves` (a key's new place),
  // `start` (the place where the keyboard begins), `clamp`, `frame` (the rectangle of a place) and `describe`.
  class Drawing {
    constructor(box, layer) {
      Object.assign(this, layer, { box, at: null, loaded: false });
      this.canvas = box.querySelector("canvas");
      this.readout = document.getElementById(`at-${layer.id}`);
      const point = (event) => {
        const at = this.find(event);
        if (at !== null) this.move(at);
      };
      box.addEventListener("pointermove", point);
      box.addEventListener("pointerdown", point);
      box.addEventListener("pointerleave", () => document.activeElement !== box && this.leave());
      box.addEventListener("keydown", (event) => this.key(event));
      box.addEventListener("focus", () => this.move(this.at ?? this.start()));
      box.addEventListener("blur", () => this.leave());
    }

    async load() {
      this.loading ??= (this.data ? inflate(this.data) : Promise.resolve(new Uint8Array())).then((bytes) => {
        this.unpack(new Planes(bytes));
        this.loaded = true;
        this.draw();
      }).catch(() => {
        this.readout.textContent = "This browser cannot unpack the drawing (it lacks DecompressionStream).";
      });
      return this.loading;
    }

    key(event) {
      const moves = this.moves(this.at ?? this.start());
      if (event.key === "Escape") this.box.blur();
      if (!(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      this.move(moves[event.key]);
    }

    async move(at) {
      this.at = this.clamp(at);
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
      this.here.hidden = false;
      for (const [side, pixels] of Object.entries(this.frame(this.at))) this.here.style[side] = `${pixels}px`;
    }

    leave() {
      this.at = null;
      if (this.here) this.here.hidden = true;
      this.readout.textContent = "";
    }
  }

  // Draw a layer in each `.map`: load its data when it comes near the screen, and draw it again when its size or the theme changes.
  const show = (Kind, layers) => {
    const byId = new Map(layers.map((layer) => [String(layer.id), layer]));
    const byBox = new Map([...document.querySelectorAll(".map")].map((box) => [box, new Kind(box, byId.get(box.dataset.layer))]));
    drawings.push(...byBox.values());
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) byBox.get(entry.target).load();
    }, { rootMargin: "800px" });
    const resized = new ResizeObserver((entries) => entries.forEach((entry) => byBox.get(entry.target).draw()));
    for (const box of byBox.keys()) { seen.observe(box); resized.observe(box); }
    addEventListener("beforeprint", () => drawings.forEach((drawing) => drawing.load()));
  };

  if (remembered()) root.dataset.theme = remembered();
  themeButton.hidden = false;
  themeButton.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remembered(root.dataset.theme);
    showTheme();
  });
  dark.addEventListener("change", showTheme);
  showTheme();

  const table = document.getElementById("table");
  table?.querySelectorAll("thead th").forEach((heading, column) => {
    heading.querySelector("button")?.addEventListener("click", () => sortBy(table, column, heading));
  });
  const only = document.getElementById("only");
  if (only && document.querySelector("tr.calm") && table.tBodies[0].rows.length > 8) {
    only.parentElement.hidden = false;
    only.addEventListener("change", () => document.body.classList.toggle("only-ill", only.checked));
  }

  return { number, percent, colour, mix, packed, niceStep, Drawing, show };
})();
