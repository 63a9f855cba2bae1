// The text of /metrics, and what follows from two readings of it.

/** Map of a series' name to [{ labels, value }, ...]. */
export function parseMetrics(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = line.match(/^([\w:]+)(?:\{(.*)\})? (\S+)/);
    if (!match) continue;
    const labels = Object.fromEntries([...(match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, name, value]) => [name, value]));
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ labels, value: Number(match[3]) });
  }
  return found;
}

const fits = (labels, wanted) => Object.entries(wanted).every(([name, value]) => labels[name] === value);

/** The sum over the series that have these labels; undefined where there is none. */
export function sum(metrics, name, wanted = {}) {
  const values = (metrics.get(name) ?? []).filter(({ labels }) => fits(labels, wanted)).map(({ value }) => value);
  return values.length ? values.reduce((a, b) => a + b) : undefined;
}

/** What has been added to a counter between two readings. */
export function increase(before, now, name, wanted) {
  const [old, latest] = [sum(before, name, wanted) ?? 0, sum(now, name, wanted)];
  return latest === undefined ? undefined : latest < old ? latest : latest - old; // the server has been started again
}

/** The quantile of what a histogram has seen between two readings, linear within a bucket; undefined without an observation. */
export function quantile(before, now, name, q, wanted = {}) {
  const rows = (now.get(`${name}_bucket`) ?? []).filter(({ labels }) => fits(labels, wanted));
  const buckets = rows.map(({ labels }) => ({
    bound: labels.le === "+Inf" ? Infinity : Number(labels.le),
    count: increase(before, now, `${name}_bucket`, { ...wanted, le: labels.le }),
  }));
  buckets.sort((a, b) => a.bound - b.bound);
  const total = buckets.at(-1)?.count;
  if (!total) return undefined;
  let [low, below] = [0, 0];
  for (const { bound, count } of buckets) {
    if (count >= q * total) return bound === Infinity ? low : low + (bound - low) * ((q * total - below) / (count - below || 1));
    [low, below] = [bound, count];
  }
  return low;
}
