
"use strict";
// Texts of documents reach the page as text nodes only.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const ALL = -1; // the place of a query in the list: all of them
const MOST = 100; // cards that are added at a time
let chosen = data.queries.length ? 0 : ALL;

function element(name, options = {}, ...children) {
  const made = document.createElement(name);
  if (options.class) made.className = options.class;
  if (options.title) made.title = options.title;
  made.append(...children);
  return made;
}

function shown(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

function clipped(text, most) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > most ? line.slice(0, most) + "…" : line;
}

const labelled = (query) => [query.kind, query.task].filter(Boolean);

function verdict(query) {
  if (query.correct === null) return [];
  return [element("span", { class: query.correct ? "chip good" : "chip bad" }, query.correct ? "correct" : "wrong")];
}

function listQueries() {
  const wanted = $("query-search").value.toLowerCase();
  const rows = [];
  const row = (index, ...children) => {
    const button = element("button", {}, ...children);
    button.dataset.query = index;
    button.setAttribute("aria-pressed", String(index === chosen));
    button.addEventListener("click", () => { chosen = index; listQueries(); showDocuments(); });
    rows.push(element("li", {}, button));
  };
  if (!wanted && data.queries.length > 1) row(ALL, "All queries");
  data.queries.forEach((query, index) => {
    const text = [query.prompt, query.completion, ...labelled(query)].join(" ").toLowerCase();
    if (!text.includes(wanted)) return;
    row(
      index,
      clipped(query.prompt, 90) + " ",
      element("span", { class: "completion" }, clipped(query.completion, 60)),
      element("div", {}, ...labelled(query).map((x) => element("span", { class: "chip" }, x)), ...verdict(query)),
    );
  });
  if (!rows.length) rows.push(element("li", { class: "of" }, "No query has this text."));
  $("queries").replaceChildren(...rows);
}

function showAsked() {
  const box = $("asked");
  if (chosen === ALL) {
    box.replaceChildren(`Documents of all ${data.queries.length} queries, in the order of the queries.`);
    return;
  }
  const query = data.queries[chosen];
  const facts = labelled(query).map((x) => element("span", { class: "chip" }, x));
  facts.push(...verdict(query));
  if (query.nats !== null) facts.push(element("span", {}, `${shown(query.nats)} nats`));
  box.replaceChildren(
    query.prompt,
    element("span", { class: "completion" }, query.completion),
    element("div", { class: "facts" }, ...facts),
  );
}

function entries() {
  const suffix = $("rank").value === "per_norm" ? "_per_norm" : "";
  const ends = $("end").value === "both" ? ["top", "bottom"] : [$("end").value];
  const queries = chosen === ALL ? data.queries.keys() : [chosen];
  const result = [];
  for (const query of queries) {
    for (const end of ends) {
      data.queries[query][end + suffix].forEach((item, index) => result.push({ ...item, query, end, rank: index + 1 }));
    }
  }
  return result;
}

// The text of a document in parts, each with the score of its token (null where there is none).
function parts(item) {
  const scored = $("tokens").checked ? data.tokens[`${item.query}:${item.document}`] : undefined;
  if (scored === undefined) return [{ text: data.documents[item.document].text, score: null }];
  return scored.texts.map((text, index) => ({ text, score: scored.scores[index] }));
}

function paint(node, score, largest) {
  if (score === null || !largest || node.textContent === "") return;
  const strength = Math.min(1, Math.abs(score) / largest);
  const colour = score > 0 ? "0, 114, 178" : "213, 94, 0";
  node.style.backgroundColor = `rgba(${colour}, ${(0.65 * strength).toFixed(3)})`;
  node.title = shown(score);
}

function textOf(item, wanted) {
  const pieces = parts(item);
  const largest = Math.max(0, ...pieces.map((piece) => Math.abs(piece.score ?? 0)));
  const whole = pieces.map((piece) => piece.text).join("");
  const marks = places(whole, wanted);
  const box = element("div", { class: "text" });
  let at = 0;
  for (const piece of pieces) {
    const node = element("span");
    const end = at + piece.text.length;
    let from = at;
    for (const [start, stop] of marks) {
      if (stop <= from || start >= end) continue;
      if (start > from) node.append(whole.slice(from, start));
      const last = Math.min(stop, end);
      node.append(element("mark", {}, whole.slice(Math.max(start, from), last)));
      from = last;
    }
    node.append(whole.slice(from, end));
    paint(node, piece.score, largest);
    box.append(node);
    at = end;
  }
  if (data.documents[item.document].cut && pieces.length === 1) box.append(" … (cut)");
  return box;
}

// Where a text occurs in another, whatever the case. Lower case may change the length of some letters; then nothing is marked.
function places(text, wanted) {
  const lower = text.toLowerCase();
  const result = [];
  if (!wanted || lower.length !== text.length) return result;
  for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, at + wanted.length)) {
    result.push([at, at + wanted.length]);
  }
  return result;
}

function card(item, wanted) {
  const source = data.documents[item.document].source;
  const facts = [
    element("span", { class: "rank" }, `${item.end} ${item.rank}`),
    element("span", {}, `document ${item.document}`),
    element("span", {}, `score ${shown(item.score)}`),
  ];
  if (item.per_nat !== null) facts.push(element("span", {}, `per nat ${shown(item.per_nat)}`));
  if (item.per_norm !== null) facts.push(element("span", {}, `per norm ${shown(item.per_norm)}`));
  if (source !== null) facts.push(element("span", { class: "chip" }, source));
  if (item.spurious) facts.push(element("span", { class: "chip bad", title: "one or two tokens have all influence" }, "spurious"));
  const made = element("article", {}, element("div", { class: "facts" }, ...facts));
  if (chosen === ALL) {
    const query = data.queries[item.query];
    made.append(element("div", { class: "of" }, `for ${clipped(query.prompt, 90)} ${clipped(query.completion, 60)}`));
  }
  const text = textOf(item, wanted);
  if (!text.textContent) text.append(element("span", { class: "of" }, "(no text)"));
  made.append(text);
  return [made, text];
}

function addMore(made, text) {
  if (text.scrollHeight <= text.clientHeight + 4) return;
  const more = element("button", { class: "more" }, "show all");
  more.addEventListener("click", () => {
    more.textContent = text.classList.toggle("open") ? "show less" : "show all";
  });
  made.append(more);
}

function addCards(items, wanted) {
  const made = items.slice(0, MOST).map((item) => card(item, wanted));
  $("cards").append(...made.map(([node]) => node));
  made.forEach(([node, text]) => addMore(node, text));
  const rest = items.slice(MOST);
  if (!rest.length) return;
  const next = element("button", { class: "more" }, `show ${Math.min(MOST, rest.length)} more documents`);
  next.addEventListener("click", () => { next.remove(); addCards(rest, wanted); });
  $("cards").append(next);
}

function showDocuments() {
  showAsked();
  const wanted = $("search").value.toLowerCase();
  const source = $("source").value;
  const every = entries();
  const matching = every.filter((item) => {
    const own = data.documents[item.document];
    const scored = data.tokens[`${item.query}:${item.document}`];
    const text = own.text || (scored ? scored.texts.join("") : "");
    return (!source || own.source === source) && text.toLowerCase().includes(wanted);
  });
  $("cards").replaceChildren();
  addCards(matching, wanted);
  const coloured = matching.filter((item) => `${item.query}:${item.document}` in data.tokens).length;
  $("legend").hidden = !(coloured && $("tokens").checked);
  const plain = matching.length - coloured;
  $("uncoloured").hidden = !(plain && $("tokens").checked);
  $("uncoloured").textContent = `${plain} of these documents ${plain === 1 ? "has" : "have"} no colours: influence score --token_scores=N scores the tokens of the first N documents of each query alone.`;
  $("count").textContent = `${matching.length} of ${every.length} documents`;
}

function showAnalyses() {
  const sections = data.tables.map((table) => {
    const head = element("tr", {}, ...table.header.map((cell) => element("th", {}, cell)));
    const rows = table.rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, cell))));
    const grid = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
    return element("section", {}, element("h2", {}, table.title), element("p", {}, table.text), element("div", { class: "wide" }, grid));
  });
  if (data.omitted.length) {
    const list = element("ul", {}, ...data.omitted.map((text) => element("li", {}, text)));
    sections.push(element("section", {}, element("h2", {}, "Not computed"), list));
  }
  $("analyses").replaceChildren(...sections);
}

function open(name) {
  for (const other of ["documents", "analyses"]) {
    $(other).hidden = other !== name;
    $(`show-${other}`).setAttribute("aria-selected", String(other === name));
  }
}

function start() {
  $("about").textContent = `${data.count.toLocaleString("en")} documents, ${data.queries.length} queries, method ${data.method}`;
  const sources = [...new Set(Object.values(data.documents).map((own) => own.source).filter((x) => x !== null))].sort();
  const options = [["", "all"], ...sources.map((source) => [source, source])];
  $("source").replaceChildren(...options.map(([value, text]) => {
    const option = element("option", {}, text);
    option.value = value;
    return option;
  }));
  $("source-label").hidden = !sources.length;
  $("rank-label").hidden = !data.per_norm;
  $("rank").value = data.per_norm ? data.rank_by : "score";
  $("tokens-label").hidden = !Object.keys(data.tokens).length;
  for (const id of ["search", "source", "end", "rank", "tokens"]) $(id).addEventListener("input", showDocuments);
  $("query-search").addEventListener("input", listQueries);
  $("show-documents").addEventListener("click", () => open("documents"));
  $("show-analyses").addEventListener("click", () => open("analyses"));
  listQueries();
  showDocuments();
  showAnalyses();
}

start();
