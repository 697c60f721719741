// What all our pages share: numbers in words, the theme, sorting the table, unpacking and colours of drawings.
const page = (() => {
  "use strict";
  const root = document.documentElement;
  const number = new Intl.NumberFormat("en");
  const percent = (share) => {
    const value = 100 * share;
    if (value > 0 && value < 0.1) return "< 0.1 %";
    if (value > 99.9 && value < 100) return "> 99.9 %";
    return `${value % 100 === 0 ? value : value.toFixed(1)} %`;
  };

  // --- theme -------------------------------------------------------------------------------------------------------
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

  // --- sorting -----------------------------------------------------------------------------------------------------
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

  // --- drawings ----------------------------------------------------------------------------------------------------
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

  // Each drawing has a `box`, loads its data when it comes near the screen, and is drawn anew when its size or the theme changes.
  const show = (...made) => {
    drawings.push(...made);
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) made.find((one) => one.box === entry.target).load();
    }, { rootMargin: "800px" });
    const resized = new ResizeObserver((entries) => {
      for (const entry of entries) made.find((one) => one.box === entry.target).draw();
    });
    made.forEach((one) => { seen.observe(one.box); resized.observe(one.box); });
    addEventListener("beforeprint", () => made.forEach((one) => one.load()));
  };

  // --- start -------------------------------------------------------------------------------------------------------
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

  return { root, number, percent, inflate, colour, mix, packed, niceStep, show };
})();
