"use strict";
// The list shows the examples that match the filters, PART at a time; the transcript of the selected one is shown.
// All text is set as text, never as HTML.
const PART = 300;
const examples = [...document.querySelectorAll("script.example")].map(block => {
  const text = block.textContent;
  const { id, group, outcome } = JSON.parse(text);
  return { id, group, outcome, text, lower: text.toLowerCase() };
});
const [list, shown, count] = ["list", "shown", "count"].map(id => document.getElementById(id));
const filters = ["outcome", "group", "text"].map(id => document.getElementById(id));

function element(parent, tag, text, css) {
  const child = parent.appendChild(document.createElement(tag));
  if (text !== undefined) child.textContent = text;
  if (css) child.className = css;
  return child;
}

function show(example, button) {
  for (const other of list.querySelectorAll("[aria-selected=true]")) other.setAttribute("aria-selected", "false");
  button.setAttribute("aria-selected", "true");
  const record = JSON.parse(example.text);
  shown.replaceChildren();
  shown.scrollTop = 0;
  element(shown, "h3", record.id);
  const scores = Object.entries(record.scores ?? {}).map(([name, value]) => `${name} ${+value.toFixed(4)}`);
  const facts = [record.outcome, ...scores, `${record.seconds} s`];
  element(shown, "p", facts.join("; "), "quiet");
  if (record.error) element(shown, "pre", record.error.message);
  if (Object.keys(record.details ?? {}).length) {
    const details = element(shown, "details");
    details.open = true;
    element(details, "summary", "details");
    element(details, "pre", JSON.stringify(record.details, null, 1));
  }
  for (const message of record.messages ?? []) {
    const row = element(shown, "div", undefined, "message");
    element(row, "b", message.name && message.role !== "tool" ? `${message.role}, ${message.name}` : message.role);
    const body = element(row, "div");
    const content = typeof message.content === "string" ? message.content : JSON.stringify(message.content ?? "");
    if (content) element(body, "div", content, "text");
    for (const call of message.tool_calls ?? []) {
      const { name, arguments: input } = call.function ?? call;
      element(body, "pre", `${name} ${typeof input === "string" ? input : JSON.stringify(input)}`);
    }
  }
}

function filter(parts = 1) {
  const [outcome, group, text] = filters.map(one => one.value);
  const wanted = text.toLowerCase();
  const matching = examples.filter(one => (!outcome || one.outcome === outcome) && (!group || one.group === group)
    && (!wanted || one.lower.includes(wanted)));
  count.textContent = `${matching.length} of ${examples.length}`;
  list.replaceChildren();
  for (const one of matching.slice(0, parts * PART)) {
    const button = element(list, "button", one.id);
    button.setAttribute("role", "option");
    element(button, "small", [one.group, one.outcome].filter(Boolean).join("; "));
    button.addEventListener("click", () => show(one, button));
  }
  if (matching.length > parts * PART) {
    element(list, "button", `${matching.length - parts * PART} more`).addEventListener("click", () => filter(parts + 1));
  }
  shown.replaceChildren();
}

for (const one of filters) one.addEventListener("input", () => filter());
filter();
