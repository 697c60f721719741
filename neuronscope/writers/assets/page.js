// What both pages share: numbers as text, the theme, the table of layers, copying, and drawings that are read by pointer and keyboard.
const page = (() => {
  "use strict";
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("report-data").textContent);
  const number = new Intl.NumberFormat("en");
  const percent = (share) => {
    const value = 100 * share;
    if (value > 0 && value < 0.1) return "< 0.1 %";
    if (value > 99.9 && value < 100) return "> 99.9 %";
    return `${(value > 0 && value < 9.95) || (value >= 99.5 && value < 100) ? value.toFixed(1) : value.toFixed(0)} %`;
  };
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  const drawings = new Set();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const themeButton = byId("theme");
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

  // Copies text. A page in a sandbox has no clipboard: there a hidden text field is selected and copied.
  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const field = make("textarea", { value: text, className: "visually-hidden" });
      document.body.append(field);
      field.select();
      document.execCommand("copy");
      field.remove();
    }
  };
  const copyButton = (label, indices) => {
    const button = make("button", { type: "button", className: "copy", textContent: label });
    button.addEventListener("click", async () => {
      await copy(indices.join(", "));
      button.textContent = `Copied ${number.format(indices.length)}`;
      button.focus();
      setTimeout(() => (button.textContent = label), 2000);
    });
    return button;
  };

  // Makes many elements one tab stop: arrow keys, Home and End move among those that are shown.
  const rove = (box, selector, back, forward) => {
    const shown = () => [...box.querySelectorAll(selector)].filter((each) => each.getClientRects().length);
    let current = null;
    const stop = (element) => {
      if (current) current.tabIndex = -1;
      current = element;
      if (current) current.tabIndex = 0;
    };
    box.querySelectorAll(selector).forEach((each) => (each.tabIndex = -1));
    const refresh = () => (current?.isConnected && current.getClientRects().length ? null : stop(shown()[0]));
    box.addEventListener("focusin", (event) => event.target.matches(selector) && stop(event.target));
    box.addEventListener("keydown", (event) => {
      const all = shown();
      const at = all.indexOf(event.target);
      const to = { [back]: at - 1, [forward]: at + 1, Home: 0, End: all.length - 1 }[event.key];
      if (at < 0 || to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      all[Math.min(Math.max(to, 0), all.length - 1)].focus();
    });
    refresh();
    return refresh;
  };

  const sortBy = (table, column, heading) => {
    const numeric = heading.dataset.type === "number";
    const first = numeric && column > 0 ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const direction = heading.getAttribute("aria-sort") === first ? other : first;
    table.querySelectorAll("th[aria-sort]").forEach((th) => th.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const key = (row) => {
      const text = row.cells[column].textContent.trim();
      if (!numeric) return text;
      return row.cells[column].dataset.key ?? (text === "·" ? 0 : /^[\d,]+$/.test(text) ? text.replaceAll(",", "") : "");
    };
    const compare = (a, b) => {
      if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === ""); // not measured stays last
      return sign * (numeric ? key(a) - key(b) : key(a).localeCompare(key(b), "en", { numeric: true }));
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    byId("said").textContent = `Sorted by ${heading.textContent.trim()}, ${direction}.`;
  };

  // The unpacked bytes of a layer, or of the overview; unpacked once.
  const bytesOf = (layer) => {
    layer.unpacking ??= (async () => {
      if (!layer.data) return (layer.bytes = new Uint8Array());
      const packed = Uint8Array.from(atob(layer.data), (char) => char.charCodeAt(0));
      const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
      return (layer.bytes = new Uint8Array(await new Response(stream).arrayBuffer()));
    })();
    return layer.unpacking;
  };
  const colour = (name) => {
    const hex = getComputedStyle(root).getPropertyValue(name).trim();
    return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  };
  // Pixels of a canvas for each of the page; on paper one, because all drawings are in memory at once.
  const ratio = () => (root.classList.contains("printing") ? 1 : Math.min(devicePixelRatio || 1, 2));
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

  // A drawing of a layer, or of all. A subclass has `unpack`, `draw`, `find` (the place at a pointer), `moves` (a key's new
  // place), `start` (the place where the keyboard begins), `clamp`, `frame` (the rectangle of a place), `describe`, and `pick`
  // (a place was clicked).
  class Drawing {
    constructor(box, layer, readout) {
      Object.assign(this, layer, { layer, box, readout, at: null, loaded: false });
      this.canvas = box.querySelector("canvas");
      const point = (event) => {
        const at = this.find(event);
        if (at !== null) this.move(at);
        return at;
      };
      box.addEventListener("pointermove", point);
      box.addEventListener("click", (event) => point(event) !== null && this.loaded && this.pick(this.at));
      box.addEventListener("pointerleave", () => document.activeElement !== box && this.leave());
      box.addEventListener("keydown", (event) => this.key(event));
      box.addEventListener("focus", () => this.move(this.at ?? this.start()));
      box.addEventListener("blur", () => this.leave());
    }

    // Draws at once if the bytes are unpacked already, as they are for printing.
    load() {
      if (this.loaded) return;
      const ready = () => {
        if (this.loaded) return;
        this.unpack(new Planes(this.layer.bytes));
        this.loaded = true;
        this.draw();
        if (this.at !== null) this.move(this.at);
      };
      if (this.layer.bytes) ready();
      else bytesOf(this.layer).then(ready).catch(() => {
        this.readout.textContent = "This browser cannot unpack the drawing (it lacks DecompressionStream).";
      });
    }

    key(event) {
      const at = this.at ?? this.start();
      const moves = this.moves(at);
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      if (event.key === "Escape") this.box.blur();
      else if (event.key === "Enter" && this.loaded) this.pick(at);
      else if (event.key in moves) this.move(moves[event.key]);
      else return;
      event.preventDefault();
    }

    move(at) {
      this.at = this.clamp(at);
      if (!this.loaded || this.at === null) return;
      this.mark();
      this.readout.textContent = this.describe(this.at);
      this.readout.style.minHeight = `${this.readout.offsetHeight}px`; // what is below never moves back under a click
    }

    mark() {
      if (!this.here) this.box.append((this.here = make("div", { className: "here" })));
      this.here.hidden = false;
      for (const [side, pixels] of Object.entries(this.frame(this.at))) this.here.style[side] = `${pixels}px`;
    }

    leave() {
      this.at = null;
      if (this.here) this.here.hidden = true;
      this.readout.textContent = "";
    }
  }

  const table = byId("table");
  const place = byId("chosen");
  const only = byId("only");
  const find = byId("find");
  const rowOf = (id) => byId(`layer-${id}`);
  const resized = new ResizeObserver((entries) => entries.forEach((entry) => entry.target.drawing.draw()));
  let Kind = null;
  let refreshRows = () => {};

  // An article about a layer: what is known of it, its drawing, and the indices to copy.
  const article = (layer) => {
    const box = byId("layer-article").content.firstElementChild.cloneNode(true);
    const name = rowOf(layer.id).cells[1].textContent.trim();
    const [map, readout] = [box.querySelector(".map"), box.querySelector("output")];
    box.className += ` ${rowOf(layer.id).className}`;
    box.querySelector("h3").textContent = name;
    box.querySelector(".meta").append(...layer.meta.flatMap(([text, bold], i) => [i ? " · " : "", bold ? make("b", {}, text) : text]));
    box.querySelector(".facts").append(...(layer.facts ?? []).map((text) => make("p", { className: "fact" }, text)));
    box.querySelector(".kept").textContent = layer.lost;
    readout.id = `at-${layer.id}`;
    if (!("data" in layer)) {
      map.remove();
      return { box };
    }
    map.dataset.layer = layer.id;
    map.setAttribute("aria-label", `Neurons of ${name}: arrow keys move, Enter shows one neuron`);
    map.setAttribute("aria-describedby", readout.id);
    const drawing = (map.drawing = new Kind(map, layer, readout));
    return { box, drawing };
  };

  const choose = (id, focus = false) => {
    const layer = data.layers.find((each) => String(each.id) === String(id));
    if (!layer || !place) return;
    table.querySelector("tr.chosen")?.classList.remove("chosen");
    rowOf(layer.id).classList.add("chosen");
    drawings.forEach((drawing) => place.contains(drawing.box) && drawings.delete(drawing));
    resized.disconnect();
    const { box, drawing } = article(layer);
    place.replaceChildren(box);
    if (drawing) {
      drawings.add(drawing);
      drawing.load();
      bytesOf(layer).then(() => box.querySelector(".indices").append(...drawing.lists().map(([label, list]) => copyButton(label, list))));
    }
    for (const each of drawings) resized.observe(each.box);
    if (focus) {
      place.scrollIntoView({ block: "nearest" });
      byId("said").textContent = `${box.querySelector("h3").textContent} is shown.`;
      (box.querySelector(".map") ?? place).focus({ preventScroll: true });
    }
  };

  const filter = () => {
    const sought = find.value.trim().toLowerCase();
    const rows = [...table.tBodies[0].rows];
    for (const row of rows) {
      row.hidden = (only.checked && row.classList.contains("calm")) || !row.cells[1].textContent.toLowerCase().includes(sought);
    }
    byId("said").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} layers are shown.`;
    refreshRows();
  };

  // Shows a drawing of the chosen layer, at first of the worst one. All layers are unpacked while nothing else is to be done,
  // and drawn for printing: nothing can be waited for then.
  const show = (DrawingKind, overview) => {
    Kind = DrawingKind;
    if (overview) drawings.add(overview);
    if (!table) return;
    choose(/^#layer-\d+$/.test(location.hash) ? location.hash.slice(7) : data.worst);
    if (overview) overview.load();
    const unpackAll = async () => {
      for (const layer of data.layers) await bytesOf(layer).catch(() => null);
      root.dataset.ready = "true";
    };
    setTimeout(unpackAll, 50);
    const printed = byId("printed");
    let theme;
    let closed = [];
    addEventListener("beforeprint", () => {
      closed = [...document.querySelectorAll("details:not([open])")];
      closed.forEach((each) => (each.open = true));
      theme = root.dataset.theme;
      root.dataset.theme = "light";
      const all = data.layers.filter((layer) => !rowOf(layer.id).hidden).map(article);
      printed.replaceChildren(...all.map(({ box }) => box));
      root.classList.add("printing");
      for (const { drawing } of all) drawing?.load();
      drawings.forEach((drawing) => drawing.draw());
    });
    addEventListener("afterprint", () => {
      root.classList.remove("printing");
      printed.replaceChildren();
      closed.forEach((each) => (each.open = false));
      if (theme) root.dataset.theme = theme;
      else delete root.dataset.theme;
      showTheme();
    });
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

  if (table) {
    table.querySelectorAll("thead th").forEach((heading, column) => {
      heading.querySelector("button")?.addEventListener("click", () => sortBy(table, column, heading));
    });
    for (const cell of table.querySelectorAll("td.share[data-key]")) cell.style.backgroundSize = `${cell.dataset.key > 0 ? Math.max(cell.dataset.key * 0.9, 2) : 0}% 3px`;
    rove(table.tHead, "button", "ArrowLeft", "ArrowRight");
    refreshRows = rove(table.tBodies[0], "th a", "ArrowUp", "ArrowDown");
    table.tBodies[0].addEventListener("click", (event) => {
      const row = event.target.closest("tr");
      if (getSelection().toString()) return; // text was selected, to be copied
      event.preventDefault();
      choose(row.id.slice(6), true);
    });
    byId("tools").hidden = false;
    only.parentElement.hidden = !document.querySelector("tr.calm") || table.tBodies[0].rows.length <= 8;
    only.addEventListener("change", filter);
    find.addEventListener("input", filter);
  }

  return { data, byId, make, number, percent, colour, mix, packed, ratio, niceStep, copyButton, bytesOf, rove, choose, Drawing, Planes, show };
})();
