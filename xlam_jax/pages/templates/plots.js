"use strict";
// Shows the values under the pointer. The page is complete without it.

// The points [step, y] of SVG path data as xlam_jax.pages.plots.path_data writes it.
function points(data) {
  const all = [];
  let x = 0, y = 0;
  for (const [, command, rest] of data.matchAll(/([Mlh])([^Mlh]*)/g)) {
    const numbers = rest.match(/-?\d+/g).map(Number);
    if (command === "h") continue;
    for (let at = 0; at < numbers.length; at += 2) {
      [x, y] = command === "M" ? [numbers[at], numbers[at + 1]] : [x + numbers[at], y + numbers[at + 1]];
      all.push([x, y]);
    }
  }
  return all;
}

// The same as xlam_jax.pages.plots.exact.
function format(value, percent) {
  if (percent) return (100 * value).toFixed(1) + "%";
  const size = Math.abs(value);
  if (size >= 1e3) return Math.round(value).toLocaleString("en");
  return size && size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

for (const figure of document.querySelectorAll("figure.plot")) {
  const frame = figure.querySelector(".frame"), svg = frame.querySelector("svg"), box = svg.viewBox.baseVal;
  const { low, high, log, percent } = figure.dataset;
  let lines, cursor, tip;
  const value = y => {
    const at = Number(low) + (1 - y / box.height) * (high - low);
    return log === undefined ? at : 10 ** at;
  };
  const prepare = () => {
    lines = [...svg.querySelectorAll("path[data-name]")].map(path => ({
      name: path.dataset.name, color: path.getAttribute("class"), points: points(path.getAttribute("d")) }));
    cursor = frame.appendChild(document.createElement("div"));
    tip = frame.appendChild(document.createElement("div"));
    cursor.className = "cursor";
    tip.className = "tip";
  };
  const show = event => {
    if (!lines) prepare();
    const area = svg.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - area.left) / area.width));
    const step = box.x + share * box.width;
    const near = lines.map(line => ({ line, point: line.points.reduce((best, point) =>
      Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best) }));
    const at = near.reduce((best, one) =>
      Math.abs(one.point[0] - step) < Math.abs(best.point[0] - step) ? one : best).point[0];
    tip.textContent = "step " + at.toLocaleString("en");
    for (const { line, point } of near) {
      const row = tip.appendChild(document.createElement("div"));
      const dot = row.appendChild(document.createElement("i"));
      dot.className = line.color.match(/c\d/)[0];
      row.append(line.name + " " + format(value(point[1]), percent !== undefined));
      if (point[0] !== at) row.append(" (step " + point[0].toLocaleString("en") + ")");
    }
    const left = 100 * (at - box.x) / box.width;
    cursor.style.left = left + "%";
    tip.style.left = left < 50 ? `calc(${left}% + 8px)` : "auto";
    tip.style.right = left < 50 ? "auto" : `calc(${100 - left}% + 8px)`;
    cursor.hidden = tip.hidden = false;
  };
  frame.addEventListener("pointermove", show);
  frame.addEventListener("pointerdown", show);
  frame.addEventListener("pointerleave", () => { if (lines) cursor.hidden = tip.hidden = true; });
}
