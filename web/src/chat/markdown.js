// Markdown to elements. HTML in a reply stays text, images become links, and what is left is sanitised once more.

import DOMPurify from "dompurify";
import hljs from "highlight.js/lib/core";
import bash from "highlight.js/lib/languages/bash";
import cpp from "highlight.js/lib/languages/cpp";
import css from "highlight.js/lib/languages/css";
import diff from "highlight.js/lib/languages/diff";
import go from "highlight.js/lib/languages/go";
import java from "highlight.js/lib/languages/java";
import javascript from "highlight.js/lib/languages/javascript";
import json from "highlight.js/lib/languages/json";
import python from "highlight.js/lib/languages/python";
import rust from "highlight.js/lib/languages/rust";
import sql from "highlight.js/lib/languages/sql";
import typescript from "highlight.js/lib/languages/typescript";
import xml from "highlight.js/lib/languages/xml";
import yaml from "highlight.js/lib/languages/yaml";
import MarkdownIt from "markdown-it";
import { h } from "../shared.js";

const languages = { bash, cpp, css, diff, go, java, javascript, json, python, rust, sql, typescript, xml, yaml };
for (const [name, language] of Object.entries(languages)) hljs.registerLanguage(name, language);

const LARGEST = 20_000; // characters of code that are highlighted
const markdown = new MarkdownIt({
  html: false,
  breaks: true,
  highlight: (code, language) =>
    hljs.getLanguage(language) && code.length < LARGEST ? hljs.highlight(code, { language, ignoreIllegals: true }).value : "",
});
// An image would tell its server that somebody reads this.
markdown.renderer.rules.image = (tokens, index) => {
  const { escapeHtml } = markdown.utils;
  const [token] = tokens.slice(index, index + 1);
  return `<a href="${escapeHtml(token.attrGet("src"))}">${escapeHtml(token.content || "image")}</a>`;
};
const allowed = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s", "span",
    "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["class", "href", "start"],
  RETURN_DOM_FRAGMENT: true,
};

/** A fragment; onCopy(text) is what the button of a block of code calls. */
export function renderMarkdown(text, onCopy) {
  const fragment = DOMPurify.sanitize(markdown.render(text), allowed);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of fragment.querySelectorAll("table")) wrap(table, h("div", { class: "wide", tabindex: 0 }));
  for (const block of fragment.querySelectorAll("pre")) {
    const code = block.querySelector("code");
    const language = code?.className.match(/language-(\S+)/)?.[1] ?? "text";
    const copy = h("button", { type: "button", class: "plain small", onclick: () => onCopy(block.textContent) }, "Copy code");
    const figure = h("div", { class: "code" }, h("div", { class: "bar" }, h("span", {}, language), copy));
    block.tabIndex = 0; // it may scroll
    wrap(block, figure);
  }
  return fragment;
}

function wrap(element, outer) {
  element.replaceWith(outer);
  outer.append(element);
}
