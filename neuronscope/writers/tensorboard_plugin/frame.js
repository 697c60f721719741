// The tab's frame: chooses a run, a phase and a report to compare with, and shows the page below. TensorBoard calls `render`.
const STYLE = `
  :root { color-scheme: light; --page: #f7f8f9; --surface: #fff; --ink: #1b2026; --line: #c9ced6; }
  :root[data-theme="dark"] { color-scheme: dark; --page: #14171b; --surface: #1c2026; --ink: #e8ebef; --line: #454d57; }
  html, body { height: 100%; margin: 0; }
  body { display: flex; flex-direction: column; background: var(--page); color: var(--ink); font: 14px/1.4 Roboto, system-ui, sans-serif; }
  form { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 18px; padding: 8px 24px; border-bottom: 1px solid var(--line); background: var(--surface); }
  label { display: flex; align-items: center; gap: 8px; min-width: 0; }
  select, button { font: inherit; color: inherit; background: var(--surface); border: 1px solid var(--line); border-radius: 6px; padding: 3px 8px; max-width: min(420px, 60vw); }
  [hidden] { display: none !important; }
  p { margin: 32px 24px; max-width: 75ch; }
  iframe { flex: 1; width: 100%; border: 0; background: var(--page); }
`;
const HELP =
  "No run here has a report of Neuronscope yet. The callbacks for Lightning and Hugging Face write one beside TensorBoard's " +
  "event files whenever they draw; in a loop of your own, a Monitor with SummaryWriterLog(writer) does.";

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const url = (path, query = {}) => `${new URL(path, import.meta.url)}?${new URLSearchParams(query)}`;
const keyOf = ({ run, tag }) => JSON.stringify([run, tag]);

// Calls `reloaded` whenever TensorBoard has read its files again. Its host asks for an answer to each message.
const listen = (reloaded) => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = ({ data }) => {
    const { type, id, isReply } = JSON.parse(data);
    if (isReply) return;
    if (type === "experimental.DataReloaded") reloaded();
    port1.postMessage(JSON.stringify({ type, id, payload: null, error: null, isReply: true }));
  };
  parent.postMessage("experimental.bootstrap", "*", [port2]);
};

export function render() {
  const [run, phase, against] = ["run", "phase", "against"].map((id) => make("select", { id }));
  const newer = make("button", { type: "button", hidden: true });
  const labels = [["Run", run], ["Phase", phase], ["Compare with", against]].map(([text, select]) => make("label", {}, text, select));
  const bar = make("form", { hidden: true }, ...labels, newer);
  const help = make("p", { textContent: "Looking for reports …" });
  const page = make("iframe", { title: "Neuronscope's report", hidden: true });
  page.allow = "clipboard-write";
  Object.assign(document, { title: "Neuronscope" }).documentElement.lang = "en";
  document.head.append(make("style", { textContent: STYLE }));
  document.body.append(bar, help, page);
  let reports = [];
  let shown = null;

  // TensorBoard's dark mode is a class of its body. The page reads its theme off the frame that it is in.
  const host = parent.document.body;
  const theme = () => {
    const name = host.classList.contains("dark-mode") ? "dark" : "light";
    document.documentElement.dataset.theme = name;
    page.dataset.theme = name;
  };
  new MutationObserver(theme).observe(host, { attributeFilter: ["class"] });
  theme();

  const fill = (select, options, wanted) => {
    select.replaceChildren(...options.map(([value, textContent]) => make("option", { value, textContent })));
    select.value = options.some(([value]) => value === wanted) ? wanted : options[0][0];
  };
  const current = () => reports.find((each) => each.run === run.value && each.tag === phase.value);
  const other = () => reports.find((each) => keyOf(each) === against.value);

  // Brings what can be chosen in line with the reports that there are, and keeps what was chosen if it is still there.
  const choices = () => {
    bar.hidden = page.hidden = !reports.length;
    help.hidden = !page.hidden;
    help.textContent = HELP;
    if (!reports.length) return;
    const names = new Map(reports.map((each) => [each.run, each.name]));
    fill(run, [...names], run.value);
    fill(phase, reports.filter((each) => each.run === run.value).map((each) => [each.tag, each.phase]), phase.value);
    const others = reports.filter((each) => each !== current());
    fill(against, [["", "nothing"], ...others.map((each) => [keyOf(each), `${each.name}, ${each.phase}`])], against.value);
    phase.parentElement.hidden = phase.options.length < 2;
    against.parentElement.hidden = others.length === 0;
  };
  const show = () => {
    const [one, two] = [current(), other()];
    shown = one && { ...one };
    newer.hidden = true;
    if (!one) return;
    const query = { run: one.run, tag: one.tag, at: `${one.step} ${one.time}` };
    if (two) Object.assign(query, { run2: two.run, tag2: two.tag });
    page.src = url("page", query) + (two ? "#h-against" : "");
  };
  const refresh = async () => {
    try {
      reports = await (await fetch(url("runs"))).json();
    } catch {
      return; // TensorBoard is gone or busy: what is shown stays, and its next reload tries again
    }
    choices();
    const now = current();
    if (!shown || !now || keyOf(now) !== keyOf(shown)) show();
    else if (now.time !== shown.time) {
      newer.textContent = `Show step ${now.step.toLocaleString("en")}`; // a reader is not thrown back to the top
      newer.hidden = false;
    }
  };
  for (const select of [run, phase, against]) {
    select.addEventListener("change", () => {
      choices();
      show();
    });
  }
  newer.addEventListener("click", show);
  bar.addEventListener("submit", (event) => event.preventDefault());
  listen(refresh);
  return refresh();
}
