// Bundles src/ into the static files of `foveate serve`, which ship in the wheel: node build.mjs [--watch]
import { cp, mkdir, readFile, readdir, rm, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import * as esbuild from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const out = join(here, "..", "python", "foveate", "serve", "static");
const options = {
  entryPoints: ["chat", "dashboard"].map((page) => ({ in: join(here, "src", page, "main.js"), out: page })),
  absWorkingDir: here,
  outdir: out,
  bundle: true,
  format: "esm",
  target: ["chrome123", "firefox120", "safari17.5"], // the first with light-dark() in their CSS
  minify: true,
  charset: "utf8",
  legalComments: "none", // licenses.txt has them whole
  metafile: true,
  logLevel: "info",
};

async function copyPages() {
  for (const name of ["index.html", "dashboard.html", "icon.svg"]) await cp(join(here, "src", name), join(out, name));
}

/** The licences of the packages of which something is in the bundles. */
async function writeLicenses(metafile) {
  const packages = new Set();
  for (const input of Object.keys(metafile.inputs)) {
    const found = input.match(/^node_modules\/((?:@[^/]+\/)?[^/]+)/);
    if (found) packages.add(found[1]);
  }
  const parts = [];
  for (const name of [...packages].sort()) {
    const folder = join(here, "node_modules", name);
    const about = JSON.parse(await readFile(join(folder, "package.json"), "utf8"));
    const file = (await readdir(folder)).find((entry) => /^licen[cs]e/i.test(entry));
    if (!file) throw new Error(`${name} has no licence file; its licence is ${about.license}`);
    const text = await readFile(join(folder, file), "utf8");
    parts.push(`${name} ${about.version} (${about.license})\n\n${text.trim()}\n`);
  }
  await writeFile(join(out, "licenses.txt"), parts.join(`\n${"-".repeat(100)}\n\n`));
}

await rm(out, { recursive: true, force: true });
await mkdir(out, { recursive: true });
await copyPages();
if (process.argv.includes("--watch")) {
  await (await esbuild.context({ ...options, minify: false })).watch();
} else {
  const { metafile } = await esbuild.build(options);
  await writeLicenses(metafile);
}
