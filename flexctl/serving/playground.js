"use strict";
// Everything that the server, the model or a person says goes into the page as text: nodes are made here, markup never.

const COLOURS = 7;
const server = { model: "", digest: "", experts: [], rights: {}, explains: false, chat: false };
let running = null;

const $ = id => document.getElementById(id);
const closed = () => server.experts.slice(1);

function make(tag, settings = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/* e0 is the public expert's alone; the others go round, then with a line above too, as in the report. */
function styleOf(name) {
  const index = server.experts.indexOf(name);
  if (index <= 0) return "e0";
  return `e${(index - 1) % COLOURS + 1}${index > COLOURS ? " again" : ""}`;
}
const keyOf = name => make("span", { class: `key ${styleOf(name)}` }, name);
const percent = share => `${(100 * share).toFixed(0)}\u00a0%`;
const counted = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const listed = names => names.join(", ");

// What the server has.

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/* Fail with the server's own words. */
async function checked(response) {
  if (response.ok) return response;
  let said = `the server answered ${response.status}`;
  try { said = (await response.json()).error.message; } catch { /* no words of its own */ }
  throw Object.assign(new Error(said), { status: response.status });
}

async function look() {
  try {
    const found = (await (await checked(await fetch("v1/models", { headers: headers() }))).json()).data[0];
    Object.assign(server, found.flexctl, { model: found.id });
    showServer();
    $("problem").textContent = "";
    return true;
  } catch (error) {
    if (error.status === 401) {
      const given = $("key").value !== "";
      $("facts").textContent = given ? `The server said: ${error.message}.` : "This server asks for an API key.";
      $("key-part").hidden = false;
      $("key").focus();
    } else {
      $("facts").textContent = `The server does not tell what it has: ${error.message}.`;
    }
    return false;
  }
}

function showServer() {
  document.title = `${server.model}: playground`;
  document.querySelector("main").removeAttribute("data-waiting");
  $("name").textContent = server.model;
  $("facts").textContent = closed().length
    ? `the public expert and ${counted(closed().length, "closed one")}`
    : "the public expert alone";
  $("digest").textContent = server.digest;
  $("told").textContent = server.explains ? ""
    : "Who answered which word is not shown: the server was started without --explain, as routing tells something of a text.";
  const switches = server.experts.map(switchOf);
  $("switches").replaceChildren($("switches").firstElementChild, ...switches);
  $("all-or-none").hidden = closed().length < 2;
  const purposes = [...new Set(Object.values(server.rights).flatMap(right => right.purposes))].sort();
  $("purposes").replaceChildren(...purposes.map(value => make("option", { value })));
  $("kinds").hidden = !server.chat;
  refresh();
}

function switchOf(name, index) {
  const about = make("span", { class: "about", id: `about-${index}` }, ...(index ? rightsOf(name) : ["the anchor, always in"]));
  const box = make("input", {
    type: "checkbox", role: "switch", name: "expert", value: name, checked: true, disabled: index === 0,
    "aria-describedby": about.id,
  });
  return make("label", { class: index ? "switch" : "switch always" }, keyOf(name), box, about);
}

function rightsOf(name) {
  const { license, expires, purposes } = server.rights[name] ?? {};
  const found = [license ?? "license unknown"];
  if (expires) {
    const isOver = expires < new Date().toISOString().slice(0, 10);
    found.push(isOver ? make("span", { class: "over" }, `rights ended on ${expires}`) : `until ${expires}`);
  } else {
    found.push("no last day");
  }
  if (purposes?.length) found.push(`for ${listed(purposes)}`);
  return found.flatMap((part, i) => i ? [" \u00b7 ", part] : [part]);
}

// What is asked.

const boxes = () => [...document.querySelectorAll("input[name=expert]:not(:disabled)")];
const leftOut = () => boxes().filter(box => !box.checked).map(box => box.value);
const isChat = () => server.chat && document.querySelector("input[name=kind]:checked").value === "chat";

/* The answers that are asked for: who is left out of each, and the body of its request. */
function asked() {
  const without = leftOut(), other = $("beside").value;
  const masks = [without];
  if (other) masks.push(other === "*" ? closed() : [...without, other.slice(1)]);
  return masks.map(mask => ({ mask, title: titleOf(mask), body: bodyOf(closed().filter(name => mask.includes(name))) }));
}

function titleOf(mask) {
  if (!mask.length) return closed().length ? "All experts" : "The public expert";
  if (mask.length === closed().length) return "The public expert alone";
  return `Without ${listed(mask)}`;
}

function bodyOf(without) {
  const prompt = $("prompt").value || $("prompt").placeholder, temperature = numberOf("temperature", 0), purpose = $("purpose").value.trim();
  return {
    model: server.model,
    ...(isChat() ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    max_tokens: numberOf("length", 64),
    temperature,
    ...(temperature > 0 ? { seed: numberOf("seed", 0) } : {}),
    ...(without.length ? { without } : {}),
    ...(purpose ? { purpose } : {}),
  };
}

function numberOf(id, other) {
  const value = $(id).valueAsNumber;
  return Number.isNaN(value) ? other : value;
}

/* After anything that decides what is asked. */
function refresh() {
  const chosen = $("beside").value, without = leftOut(), names = closed().filter(name => !without.includes(name));
  const choices = [["", "nothing"], ...names.map(name => [`-${name}`, `the same without ${name}`])];
  if (closed().length && without.length < closed().length) choices.push(["*", "the public expert alone"]);
  $("beside").replaceChildren(...choices.map(([value, text]) => make("option", { value }, text)));
  $("beside").value = choices.some(([value]) => value === chosen) ? chosen : "";
  $("seed").disabled = !(numberOf("temperature", 0) > 0);
  showCalls();
}

// The call.

function showCalls() {
  const calls = asked();
  $("calls").replaceChildren(...calls.map(({ title, body }) => make("div", {},
    ...(calls.length > 1 ? [make("h3", {}, title)] : []),
    codeOf("curl", curlOf(body), title),
    codeOf("Python", pythonOf(body), title))));
}

function codeOf(language, text, title) {
  const figure = $("code").content.cloneNode(true).firstElementChild;
  figure.querySelector(".language").textContent = language;
  figure.querySelector("code").textContent = text;
  figure.querySelector("pre").setAttribute("aria-label", `${language}, ${title}`);
  figure.querySelector(".copy").setAttribute("aria-label", `Copy ${language}, ${title}`);
  return figure;
}

const address = () => new URL("v1", document.baseURI).href;
const pathOf = body => "messages" in body ? "chat/completions" : "completions";
const quoted = text => `'${text.replaceAll("'", "'\\''")}'`;

function curlOf(body) {
  const key = $("key").value.trim() ? ['  -H "Authorization: Bearer $FLEXCTL_API_KEY"'] : [];
  return [
    `curl ${quoted(`${address()}/${pathOf(body)}`)}`,
    "  -H 'Content-Type: application/json'",
    ...key,
    `  -d ${quoted(JSON.stringify(body))}`,
  ].join(" \\\n");
}

function pythonOf({ without, purpose, ...known }) {
  const more = { ...(without ? { without } : {}), ...(purpose ? { purpose } : {}) };
  const settings = [
    ...Object.entries(known).map(([name, value]) => `${name}=${JSON.stringify(value)}`),
    ...(Object.keys(more).length ? [`extra_body=${JSON.stringify(more)}`] : []),
  ];
  const [create, text] = "messages" in known
    ? ["chat.completions.create", "message.content"] : ["completions.create", "text"];
  return [
    "import os",
    "from openai import OpenAI",
    "",
    "client = OpenAI(",
    `    base_url=${JSON.stringify(address())},`,
    '    api_key=os.environ.get("FLEXCTL_API_KEY", "none"),',
    ")",
    `answer = client.${create}(`,
    ...settings.map(line => `    ${line},`),
    ")",
    `print(answer.choices[0].${text})`,
  ].join("\n");
}

async function copy(button) {
  const code = button.closest("figure").querySelector("code");
  let said = "Copied";
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    // Pages that are not on this machine and not encrypted have no clipboard.
    getSelection().selectAllChildren(code);
    said = "Selected";
  }
  button.textContent = said;
  say(said === "Copied" ? "Copied." : "Selected; copy it by the keyboard.");
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}

// The answer.

/* One answer as it comes. */
class Pane {
  constructor({ title, body }) {
    this.element = $("pane").content.cloneNode(true).firstElementChild;
    this.title = title;
    this.pieces = [];
    this.tokens = 0;
    this.text = "";
    this.element.setAttribute("aria-label", title);
    this.part("h3").textContent = title;
    this.part(".excerpt").setAttribute("aria-label", `Answer: ${title}`);
    this.part(".words .scroll").setAttribute("aria-label", `Pieces, table: ${title}`);
    this.part(".state").textContent = "Asking\u2026";
    this.part(".readout").hidden = !server.explains;
    this.element.toggleAttribute("data-busy", true);
    if ("prompt" in body) this.part(".excerpt").append(make("span", { class: "prompt" }, body.prompt));
    this.part(".excerpt").addEventListener("keydown", event => this.step(event));
    this.part(".excerpt").addEventListener("pointerover", event => this.point(event.target));
    this.part(".words").addEventListener("toggle", () => this.showWords());
  }

  part(selector) { return this.element.querySelector(selector); }

  /* One token. Those that are part of a letter alone have no text of their own. */
  add(text, shares) {
    this.tokens += 1;
    this.part(".state").textContent = `${counted(this.tokens, "token")}\u2026`;
    if (!text) return;
    this.text += text;
    const leader = shares && Object.keys(shares).reduce((best, name) => shares[name] > shares[best] ? name : best);
    const span = make("span", { class: leader ? styleOf(leader) : "plainly" }, text);
    if (leader) span.style.setProperty("--s", shares[leader].toFixed(3));
    this.pieces.push({ text, shares, leader, span });
    this.part(".excerpt").append(span);
  }

  /* Who took part, as the server says it at the end. */
  account({ experts, reasons, shares = {} }) {
    this.shares = shares;
    const shown = server.experts.filter(name => name in reasons || name in shares);
    this.part(".shares").replaceChildren(...shown.map(name => experts.includes(name)
      ? this.shareOf(name)
      : make("li", { class: "out" }, keyOf(name), make("span", {}, `left out: ${reasons[name]}`))));
    this.part(".words").hidden = !Object.keys(shares).length;
  }

  shareOf(name) {
    const bar = make("span", { class: styleOf(name) });
    bar.style.setProperty("--s", this.shares[name].toFixed(3));
    return make("li", {}, keyOf(name), make("span", { class: "bar", "aria-hidden": "true" }, bar),
      make("span", { class: "percent" }, percent(this.shares[name])));
  }

  end(said) {
    this.element.toggleAttribute("data-busy", false);
    this.part(".state").textContent = said;
  }

  /* Arrow keys go from piece to piece. */
  step(event) {
    const last = this.pieces.length - 1, now = this.pieces.findIndex(piece => piece.span.classList.contains("current"));
    const next = { ArrowRight: Math.min(now + 1, last), ArrowLeft: Math.max(now - 1, 0), Home: 0, End: last }[event.key];
    if (next === undefined || last < 0 || !this.pieces[next].shares) return;
    event.preventDefault();
    this.point(this.pieces[next].span);
  }

  point(span) {
    const piece = this.pieces.find(piece => piece.span === span);
    if (!piece?.shares) return;
    for (const other of this.pieces) other.span.classList.toggle("current", other === piece);
    const ranked = Object.entries(piece.shares).sort((a, b) => b[1] - a[1]).filter(([, share]) => share >= 0.005);
    this.part(".readout").replaceChildren(make("code", {}, JSON.stringify(piece.text)), " ",
      ranked.map(([name, share]) => `${name} ${percent(share)}`).join(" \u00b7 "));
  }

  showWords() {
    if (!this.part(".words").open) return;
    const names = server.experts.filter(name => this.pieces.some(piece => name in (piece.shares ?? {})));
    const head = ["piece", "leading", ...names].map((name, i) => make("th", { scope: "col", class: i > 1 && "figure" }, name));
    const rows = this.pieces.map(({ text, leader, shares }) => make("tr", {},
      make("th", { scope: "row" }, make("code", {}, JSON.stringify(text))), make("td", {}, leader ?? ""),
      ...names.map(name => make("td", { class: "figure" }, percent(shares?.[name] ?? 0)))));
    this.part(".words .scroll").replaceChildren(make("table", {},
      make("caption", { class: "hidden" }, `Pieces of the answer: ${this.title}`),
      make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
  }
}

/* Yield the objects of a stream of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
      const data = rest.slice(0, end).replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

const ENDS = { stop: "ended by itself", length: "ended at the length asked for" };

async function answer(pane, body, signal) {
  try {
    const response = await checked(await fetch(`v1/${pathOf(body)}`, {
      method: "POST", headers: headers(), body: JSON.stringify({ ...body, stream: true }), signal,
    }));
    let reason = null;
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      // The first piece of a conversation has the role, the last one has the reason; between them are the tokens.
      if (choice.finish_reason) reason = choice.finish_reason;
      else if (!choice.delta?.role) pane.add(choice.text ?? choice.delta.content, chunk.flexctl?.shares);
      if (chunk.flexctl?.experts) pane.account(chunk.flexctl);
    }
    if (reason === null) throw new Error("the answer broke off");
    pane.end(`${counted(pane.tokens, "token")}, ${ENDS[reason] ?? reason}`);
    return true;
  } catch (error) {
    const stopped = error.name === "AbortError";
    pane.end(stopped ? `Stopped after ${counted(pane.tokens, "token")}` : "No answer");
    if (!stopped) $("problem").textContent = `${pane.title}: ${error.message}`;
    return false;
  }
}

async function go() {
  const calls = asked(), panes = calls.map(call => new Pane(call));
  running = new AbortController();
  $("go").textContent = "Stop";
  $("go").toggleAttribute("data-busy", true);
  $("problem").textContent = $("fork").textContent = "";
  $("nothing").hidden = true;
  $("panes").replaceChildren(...panes.map(pane => pane.element));
  $("answers-title").textContent = panes.length > 1 ? "Answers" : "Answer";
  say("Answering.");
  const all = await Promise.all(panes.map((pane, i) => answer(pane, calls[i].body, running.signal)));
  running = null;
  $("go").textContent = "Answer";
  $("go").toggleAttribute("data-busy", false);
  if (panes.length > 1 && all.every(Boolean)) compare(...panes);
  say(panes.map(summary).join(" ") + ` ${$("fork").textContent}`);
}

function summary({ title, shares, element }) {
  const leader = shares && Object.keys(shares).length
    && Object.keys(shares).reduce((best, name) => shares[name] > shares[best] ? name : best);
  const state = element.querySelector(".state").textContent;
  return `${title}: ${state}.${leader ? ` Most by ${leader}, ${percent(shares[leader])}.` : ""}`;
}

/* Say where two answers part, and mark it in both. */
function compare(one, other) {
  if (one.text === other.text) {
    $("fork").textContent = "Both answers are the same.";
    return;
  }
  let same = 0;
  while (one.pieces[same] && one.pieces[same].text === other.pieces[same]?.text) same += 1;
  for (const pane of [one, other]) pane.pieces[same]?.span.classList.add("fork");
  $("fork").textContent = same ? `They part after ${counted(same, "token")}, at the bar.` : "They part at the first token.";
}

function say(text) { $("status").textContent = text; }

// Who listens.

function submit(event) {
  event.preventDefault();
  if (running) { running.abort(); return; }
  if (!$("prompt").value.trim()) {
    $("problem").textContent = "Write a prompt first.";
    $("prompt").focus();
    return;
  }
  go();
}

$("ask").addEventListener("submit", submit);
$("key-form").addEventListener("submit", async event => {
  event.preventDefault();
  if (await look()) $("prompt").focus();
});
$("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
});
document.addEventListener("keydown", event => { if (event.key === "Escape" && running) running.abort(); });
for (const [id, on] of [["all", true], ["none", false]]) {
  $(id).addEventListener("click", () => {
    for (const box of boxes()) box.checked = on;
    refresh();
  });
}
document.querySelector("main").addEventListener("input", refresh);
$("calls").addEventListener("click", event => { if (event.target.matches(".copy")) copy(event.target); });
look();
