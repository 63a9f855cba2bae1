// A small line over the last minutes, as SVG.

const NS = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [240, 44];

function svg(tag, attributes) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** values: the oldest first, undefined where there was none. From 0 to the largest, or from the least where some are negative. */
export function sparkline(values, places) {
  const known = values.filter((value) => value !== undefined);
  const [low, high] = [Math.min(0, ...known), Math.max(0, ...known)];
  const chart = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "chart", "aria-hidden": "true" });
  const x = (i) => (WIDTH * (i + places - values.length)) / (places - 1);
  const y = (value) => HEIGHT - 2 - ((HEIGHT - 4) * (value - low)) / (high - low || 1);
  let line = [];
  const end = () => {
    if (line.length > 1) chart.append(svg("polyline", { points: line.join(" ") }));
    line = [];
  };
  values.forEach((value, i) => (value === undefined ? end() : line.push(`${x(i).toFixed(1)},${y(value).toFixed(1)}`)));
  end();
  return chart;
}
