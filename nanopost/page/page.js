/* What the page shows. Python has computed the numbers (nanopost/tools/inspect.py); the models that one talks to are
   run by transformer.js. Text only ever becomes text: nothing here writes HTML. */
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const tokenizer = new Tokenizer(data.tokens, data.special);
const END = tokenizer.id("<|end|>");

// ------------------------------------------------------------------------------------------- the quantities
// {name: [title, formula, what it means in words]}

const QUANTITIES = {
  reward: ["reward", "R = −β k, and on the last token + score",
    "What PPO pays for each token. The reward model reads finished answers, so its score is paid at the end token; all others just pay for their distance from the reference."],
  penalty: ["KL in the reward", "−β k",
    "What a token costs by itself: β times its log-ratio. A token that the model likes much better than the reference is dear, one that both like costs nothing, and one it likes less earns a little."],
  ratio: ["log-ratio", "k = log π − log π_ref",
    "Blue: the model likes the token better than the reference does; orange: less. Summed over sampled answers, its mean is KL(π ‖ π_ref), in nats."],
  kl: ["exact KL", "KL(π ‖ π_ref) at this place",
    "The log-ratio averaged over all tokens that could have come here, not only the one that did. It is never negative; the log-ratio is its estimate from one sample."],
  logprob: ["log-probability", "log π",
    "How likely the model found the token, in nats: 0 is certain, −0.7 one in two, −2.3 one in ten. The deeper, the more of a surprise."],
  value: ["value", "V", "What the value head, before the token is written, expects all rewards from here on to sum to."],
  advantage: ["advantage", "A = Σ (γλ)ˡ δ, δ = R + γ V(next) − V",
    "How much better than expected it went from this token on (GAE). PPO makes blue tokens likelier and orange ones less likely."],
  return: ["return", "G = A + V", "What the value is trained towards: the rewards from this token on, as far as λ trusts them more than later values."],
  mask: ["mask", "1 or 0", "What a loss looks at: the answer with its end token is 1, the prompt 0. Nobody trains the model to write prompts."],
};

const models = data.models;
const short = folder => folder.split(/[\\/]/).filter(Boolean).at(-1) ?? folder; // out/ppo -> ppo
const unique = folder => models.filter(model => short(model.name) === short(folder)).length === 1;
const names = Object.fromEntries(models.map(({ name }) => [name, unique(name) ? short(name) : name]));
const isReference = model => model.name.replace(/\/+$/, "") === data.reference.replace(/\/+$/, "");
const sum = numbers => numbers.reduce((a, b) => a + b, 0);
const mean = numbers => sum(numbers) / numbers.length;

const UNSIGNED = new Set(["mask", "kl", "loss"]); // quantities that are never negative

/* A number with its sign; of a quantity that has none, without. */
function signed(x, digits = 2, quantity = "") {
  const text = Math.abs(x).toFixed(quantity === "mask" ? 0 : digits);
  return UNSIGNED.has(quantity) || Number(text) === 0 ? text : (x < 0 ? "−" : "+") + text;
}

/* The numbers of an answer by the name of the quantity. */
function columnsOf(answer, beta) {
  const { columns } = answer, all = { mask: answer.ids.map(() => 1), ...columns };
  if (columns.ratio) all.penalty = columns.ratio.map(k => -beta * k);
  return all;
}
const shown = new Map(); // quantity -> the largest |number| in the answers: the same colour is the same number everywhere
for (const model of models) for (const answer of model.answers)
  for (const [name, column] of Object.entries(columnsOf(answer, model.beta)))
    shown.set(name, Math.max(shown.get(name) ?? 1e-6, ...column.map(Math.abs)));

const state = { prompt: 0, quantity: Object.keys(QUANTITIES).find(name => shown.has(name)), run: 0, step: 0, picked: null, pointer: {} };

// ------------------------------------------------------------------------------------------------- drawing

const $ = selector => document.querySelector(selector);

/* An element with properties and children; strings become text nodes. */
function el(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.flat().filter(child => child !== null && child !== undefined && child !== ""));
  return element;
}

/* A token as it can be seen: bytes that are only a part of a character, and what has no shape, by their numbers. */
function visible(id) {
  const text = tokenizer.text(id);
  if (text === null) return Array.from(bytesOf(data.tokens[id]), byte => `⟨${byte.toString(16)}⟩`).join("");
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/[\p{C}\p{Zl}\p{Zp}]/gu, c => `⟨${c.codePointAt(0).toString(16)}⟩`);
}
const textOf = ids => new TextDecoder().decode(bytesOf(ids.map(id => id < data.tokens.length ? data.tokens[id] : data.special[id - data.tokens.length]).join("")));

/* A row of tokens. numbers: one for each, or null where the token has none; most: the number of the deepest colour;
   detail(i): what to show of token i. Left and right go from token to token, up and down from row to row. */
function strip(ids, numbers, most, quantity, detail) {
  const tokens = ids.map((id, i) => {
    const x = numbers[i], off = x === null;
    const token = el("button", { type: "button", className: "token", tabIndex: i === 0 ? 0 : -1 },
      el("span", { className: "text" }, visible(id)), el("span", { className: "number" }, off ? "" : signed(x, 2, quantity)));
    token.classList.toggle("special", id >= data.tokens.length);
    token.classList.toggle("off", off);
    token.classList.toggle("nil", !off && Math.abs(x) < 0.005);
    token.setAttribute("aria-label", `${visible(id)}${off ? "" : `, ${title(quantity)} ${signed(x, 4, quantity)}`}`);
    if (!off) { // the square root: small numbers can be seen beside large ones
      token.style.setProperty("--side", x < 0 || quantity === "loss" ? "var(--minus)" : "var(--plus)");
      token.style.setProperty("--strength", `${100 * Math.sqrt(Math.min(1, Math.abs(x) / most))}%`);
    }
    const show = () => pick(token, detail, i);
    for (const event of ["focus", "click"]) token.addEventListener(event, show);
    token.addEventListener("mouseenter", event => { if (moved(event)) show(); });
    return token;
  });
  const row = el("div", { className: "strip" }, tokens);
  row.setAttribute("role", "group");
  row.addEventListener("keydown", event => {
    const at = tokens.indexOf(event.target), rows = [...document.querySelectorAll(".strip")];
    const beside = rows[rows.indexOf(row) + { ArrowUp: -1, ArrowDown: 1 }[event.key]]?.children;
    const to = beside ? beside[Math.min(at, beside.length - 1)]
      : tokens[{ ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tokens.length - 1 }[event.key]];
    if (at < 0 || !to) return;
    event.preventDefault();
    for (const token of to.parentElement.children) token.tabIndex = token === to ? 0 : -1;
    to.focus();
  });
  return row;
}

/* Whether the pointer has moved, and not only the page below it. */
const moved = event => event.screenX !== state.pointer.screenX || event.screenY !== state.pointer.screenY;
document.addEventListener("mousemove", event => { state.pointer = event; });

/* Shows the detail of a token, and marks it. */
function pick(token, detail, i) {
  state.picked?.classList.remove("picked");
  state.picked = token;
  token?.classList.add("picked");
  $("#detail .token-detail").replaceChildren(...(token ? detail(i) : []));
  $("#detail").hidden = !token && !$(".lesson").textContent;
}
const title = quantity => QUANTITIES[quantity]?.[0] ?? quantity;

const table = (head, rows, current = -1) => el("table", {},
  head && el("tr", {}, head.map(text => el("th", { className: "up", scope: "col" }, text))),
  rows.map(([title, ...cells], i) => el("tr", { className: i === current ? "current" : "" },
    el("th", { scope: "row" }, title), cells.map(cell => cell instanceof Node ? cell : el("td", {}, cell)))));

const opening = (id, where) => [el("div", { className: "big" }, `“${visible(id)}”`), el("p", {}, where)];

/* What there is to know about token i of an answer. */
function answerDetail(model, answer, columns) {
  return i => {
    const known = Object.keys(QUANTITIES).filter(name => columns[name]);
    const parts = [...opening(answer.ids[i], `token ${i + 1} of ${answer.ids.length} by ${names[model.name]}, id ${answer.ids[i]}`),
      table(null, known.map(name => [title(name), signed(columns[name][i], 4, name)]), known.indexOf(state.quantity))];
    if (columns.reward) parts.push(el("p", {}, sumOfReward(model, answer, columns, i)));
    if (answer.likely) parts.push(...alternatives(answer.ids[i], answer.likely(i)));
    return parts;
  };
}

function sumOfReward(model, answer, columns, i) {
  const cost = `−${model.beta} × ${signed(columns.ratio[i], 4)}`;
  if (i < answer.ids.length - 1) return `reward = −β k = ${cost} = ${signed(columns.penalty[i], 4)}`;
  const why = answer.ended ? "The answer is finished: only here is there something to score."
    : "The answer did not end: in place of its score stands that of a missing end.";
  const score = `${answer.score < 0 ? "−" : "+"} ${Math.abs(answer.score).toFixed(4)}`;
  return `reward = −β k + score = ${cost} ${score} = ${signed(columns.reward[i], 4)}. ${why}`;
}

/* ids: the token that came, then the likeliest; under: {model: their probabilities}. */
function alternatives(came, { ids, under }) {
  const cell = p => {
    const cell = el("td", { className: "p" }, p.toFixed(4).replace(/^0/, ""));
    cell.style.setProperty("--share", `${100 * p}%`);
    return cell;
  };
  const row = (id, k) => el("tr", { className: id === came ? "current" : "" },
    el("th", { scope: "row" }, visible(id)), Object.values(under).map(p => cell(p[k])));
  const head = el("tr", {}, el("td"), Object.keys(under).map(name => el("th", { className: "up", scope: "col" }, names[name])));
  const rows = ids.map(row), among = ids.indexOf(came, 1) > 0;
  return [el("h3", {}, "What could have come here"), el("table", { className: "likely" }, head, among ? rows.slice(1) : [...rows.slice(1), rows[0]]),
    el("p", {}, `The five likeliest tokens, with their probability under each model. ${among ? "Bold is the one that came." : "The last line is the one that came."}`)];
}

/* The alternatives that Python has computed. */
for (const model of models) for (const answer of model.answers) {
  const { likely, under } = answer;
  answer.likely = i => ({ ids: likely[i], under: Object.fromEntries(Object.entries(under).map(([name, p]) => [name, p[i]])) });
}

/* An answer with its numbers: what is known of the whole, the tokens, and the parts of the gold reward. */
function card(model, answer, name) {
  const columns = columnsOf(answer, model.beta), quantity = columns[state.quantity] ? state.quantity : "logprob";
  const stats = el("span", { className: "stats" });
  const say = (label, value) => stats.append(stats.childNodes.length ? " · " : "", `${label} `, el("b", {}, value));
  if (answer.score !== undefined) say("score", signed(answer.score));
  if (answer.gold !== undefined) say("gold", signed(answer.gold));
  if (columns.ratio) say("sum of log-ratios", signed(sum(columns.ratio)));
  if (columns.reward) say("all rewards", signed(sum(columns.reward)));
  say("tokens", answer.ids.length);
  if (!answer.ended) say("does not end", "");
  if (quantity !== state.quantity) say(`there is no ${title(state.quantity)} here; this is the`, title(quantity));
  const row = strip(answer.ids, columns[quantity], shown.get(quantity) ?? 1, quantity, answerDetail(model, answer, columns));
  row.setAttribute("aria-label", `Answer of ${name}: ${textOf(answer.ids)}`);
  const gold = Object.entries(answer.parts ?? {}).map(([part, points]) => `${part} ${signed(points, 1)}`).join(", ");
  return el("div", { className: "card" }, el("header", {}, el("h3", {}, name), stats), row,
    gold && el("p", { className: "parts" }, `gold: ${gold}`));
}

function titleOf(model) {
  if (isReference(model)) return `${names[model.name]}, the reference`;
  return names[model.name] + (model.method === "ppo" ? `, β = ${model.beta}` : "");
}

// ------------------------------------------------------------------------------------------------ sections

function promptStrip(ids) {
  const number = state.quantity === "mask" ? 0 : null;
  return strip(ids, ids.map(() => number), 1, "mask", i => [...opening(ids[i], "a token of the prompt"),
    el("p", {}, "The prompt is given. No loss looks at it (its mask is 0), and it gets no reward.")]);
}

function drawAnswers() {
  const prompt = $("#answers .prompt");
  prompt.replaceChildren(promptStrip(data.prompts[state.prompt]));
  $("#answers .cards").replaceChildren(...models.map(model => card(model, model.answers[state.prompt], titleOf(model))));
}

const runs = models.filter(model => model.course.length);
for (const run of runs) run.course.push({ step: "end", answers: run.answers });

function drawCourse() {
  const model = runs[state.run];
  if (!model) return;
  const { step, answers } = model.course[state.step];
  const where = step === 0 ? "step 0: the reference" : step === "end" ? "the end" : `step ${step}`;
  $("#step").max = model.course.length - 1;
  $("#step").value = state.step;
  $("#step").setAttribute("aria-valuetext", where);
  $(".slider output").textContent = step === "end" ? "the end" : `step ${step}`;
  $("#course .cards").replaceChildren(promptStrip(data.prompts[state.prompt]), card(model, answers[state.prompt], `${names[model.name]}, ${where}`));
  const measures = { score: a => a.score, gold: a => a.gold, "KL, nats": a => a.columns.ratio && sum(a.columns.ratio) };
  $("#course .charts").replaceChildren(...Object.entries(measures).filter(([, of]) => of(answers[0]) !== undefined).map(([name, of]) => chart(name, of)));
}

/* Means over the prompts of the page, in the course of training: the chosen run is thick. */
function chart(name, measure) {
  const [width, height, left, right, top, bottom] = [260, 118, 34, 8, 22, 18];
  const svg = (tag, attributes, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const lines = runs.map(run => run.course.map(({ answers }) => mean(answers.map(measure))));
  const low = Math.min(0, ...lines.flat()), high = Math.max(0.01, ...lines.flat());
  const x = (i, line) => left + (width - left - right) * i / Math.max(1, line.length - 1);
  const y = value => top + (height - top - bottom) * (high - value) / (high - low);
  const path = line => "M" + line.map((value, i) => `${x(i, line).toFixed(1)},${y(value).toFixed(1)}`).join("L");
  const own = lines[state.run], at = own[state.step];
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${name}: ${signed(at)} at this step` },
    svg("text", { x: 0, y: 12 }, `${name} ${signed(at)}`),
    svg("line", { x1: left, x2: width - right, y1: y(0), y2: y(0) }),
    ...[low, high].map(value => svg("text", { class: "soft", x: left - 4, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(Math.abs(value) < 10 ? 1 : 0))),
    ...lines.map(line => svg("path", { d: path(line) })), svg("path", { d: path(own), class: "current" }),
    svg("line", { class: "now", x1: x(state.step, own), x2: x(state.step, own), y1: top, y2: height - bottom }),
    svg("circle", { cx: x(state.step, own), cy: y(at), r: 4.5 }),
    svg("text", { class: "soft", x: left, y: height - 4 }, "SFT"), svg("text", { class: "soft", x: width - right, y: height - 4, "text-anchor": "end" }, "end"));
  return picture;
}

function drawDemonstration() {
  const record = data.demonstrations[$("#record").value], quantity = $("#sft-number").value, model = models[$("#sft-model").value];
  const targets = record.ids.map((_, i) => i).filter(i => record.mask[i]);
  const nll = (of, i) => record.nll[of.name][i - 1]; // of token i, predicted from those before it
  const losses = models.map(of => mean(targets.map(i => nll(of, i))));
  const numbers = record.ids.map((_, i) => quantity === "mask" ? Number(record.mask[i]) : record.mask[i] ? nll(model, i) : null);
  const row = strip(record.ids, numbers, quantity === "mask" ? 1 : 5, quantity, i => [
    ...opening(record.ids[i], `token ${i + 1} of ${record.ids.length}, mask ${Number(record.mask[i])}`),
    el("p", {}, record.mask[i] ? "A target: its −log π is a part of the loss, and pushes up its probability." : "Not a target: read, but not trained to be written."),
    table(null, i ? models.map(of => [`−log π, ${names[of.name]}`, nll(of, i).toFixed(4)]) : [])]);
  $("#sft .cards").replaceChildren(el("div", { className: "card" }, el("header", {}, el("h3", {}, names[model.name]),
    el("span", { className: "stats" }, `loss = sum over the ${targets.length} targets / ${targets.length} = `, el("b", {}, losses[models.indexOf(model)].toFixed(4)), " nats per token")), row),
  el("p", { className: "losses" }, "Loss of this record: ", models.map((of, k) => `${names[of.name]} ${losses[k].toFixed(4)}`).join(", "), "."));
}

function drawPair() {
  const pair = data.pairs[$("#pair").value], { beta } = pair, name = $("#dpo-model").value;
  const own = pair.under[name], reference = pair.under[""], sides = ["chosen", "rejected"];
  const ratios = sides.map((_, s) => own.tokens[s].map((x, i) => x - reference.tokens[s][i]));
  const most = Math.max(1, ...ratios.flat().map(Math.abs));
  const cards = sides.map((side, s) => el("div", { className: "card" },
    el("header", {}, el("h3", {}, side), el("span", { className: "stats" }, "implicit reward β (log π − log π_ref) = ", el("b", {}, signed(own.rewards[s], 4)))),
    strip(pair.sides[s], ratios[s], most, "ratio", i => [...opening(pair.sides[s][i], `token ${i + 1} of the ${side} answer`), table(null, [
      [`log π, ${names[name]}`, signed(own.tokens[s][i], 4)], ["log π_ref", signed(reference.tokens[s][i], 4)],
      ["log-ratio", signed(ratios[s][i], 4)], ["its share of the implicit reward", signed(beta * ratios[s][i], 4)]])])));
  $("#dpo .cards").replaceChildren(promptStrip(pair.prompt), ...cards);
  const [chosen, rejected] = own.rewards, margin = chosen - rejected, weight = 1 / (1 + Math.exp(margin));
  const bar = el("span", { className: "bar" });
  bar.style.setProperty("--share", `${100 * weight}%`);
  $("#dpo .sums").replaceChildren(
    table(["", "log π", "log π_ref", "log-ratio", "implicit reward"], sides.map((side, s) => [side, signed(own.sums[s], 4), signed(reference.sums[s], 4),
      signed(own.sums[s] - reference.sums[s], 4), signed(own.rewards[s], 4)])),
    el("p", {}, `β = ${beta}. The margin βh is ${signed(chosen, 4)} − (${signed(rejected, 4)}) = ${signed(margin, 4)}.`),
    el("p", {}, "Loss −log σ(βh) = ", el("b", {}, own.loss.toFixed(4)), "; log 2 = 0.6931 is that of a model that prefers neither, as the reference."),
    el("p", {}, "Weight of the gradient σ(−βh) = ", el("b", {}, weight.toFixed(4)), " ", bar, " A pair that is already in the right order pulls less; one that is in the wrong order pulls with almost all its weight."));
}

// ---------------------------------------------------------------------------------------------------- talking

const embedded = models.filter(model => model.bits);
const network = model => model.network ??= new GPT(model.sizes, unpack(model.bits, model.shapes));
let asked = 0;

/* The answer of an embedded model, with the numbers that can be had without Python. */
function answer(model, prompt, temperature, noise) {
  const steps = [...generate(network(model), prompt, END, { temperature, noise })], ids = steps.map(step => step.id);
  const found = { ids, ended: ids.at(-1) === END, columns: { logprob: steps.map(({ id, logprobs }) => logprobs[id]) } };
  const reference = embedded.find(isReference);
  if (reference) {
    const theirs = network(reference).distributions([...prompt, ...ids], prompt.length);
    found.columns.ratio = steps.map(({ id, logprobs }, i) => logprobs[id] - theirs[i][id]);
    found.columns.kl = steps.map(({ logprobs }, i) => sum(logprobs.map((x, id) => Math.exp(x) * (x - theirs[i][id]))));
  }
  let all; // the distributions of the others are computed when somebody wants to see them
  found.likely = i => {
    all ??= embedded.map(other => [other.name, other === model ? steps.map(step => step.logprobs) : network(other).distributions([...prompt, ...ids], prompt.length)]);
    const likeliest = Array.from(steps[i].logprobs.keys()).sort((a, b) => steps[i].logprobs[b] - steps[i].logprobs[a]).slice(0, 5);
    const shown = [ids[i], ...likeliest];
    return { ids: shown, under: Object.fromEntries(all.map(([name, logprobs]) => [name, shown.map(id => Math.exp(logprobs[i][id]))])) };
  };
  return found;
}

let answered = []; // [model, answer] of the last prompt
const drawTalk = () => $("#talk .cards")?.replaceChildren(...answered.map(([model, found]) => card(model, found, titleOf(model))));

async function ask() {
  const turn = ++asked, prompt = tokenizer.prompt($("#typed").value), temperature = Number($("#temperature").value);
  const status = $("#talk .status"), room = data.context - prompt.length;
  answered = [];
  drawTalk();
  $("#talk .prompt").replaceChildren();
  if (room < 1) return void (status.textContent = `This prompt has ${prompt.length} tokens; the models read ${data.context}, the answer included. Please shorten it.`);
  $("#talk .prompt").replaceChildren(promptStrip(prompt));
  for (const model of embedded) {
    status.textContent = `${names[model.name]} is answering`;
    await new Promise(done => setTimeout(done)); // let the browser draw
    if (turn !== asked) return;
    answered.push([model, answer(model, prompt, temperature, data.noise[$("#draw").value])]);
    drawTalk();
  }
  status.textContent = room < data.noise[0].length ? `A long prompt: there is room for answers of ${room} tokens.` : "";
}

// ----------------------------------------------------------------------------------------- controls, and where to begin

function fill(select, texts, values = texts.map((_, i) => i)) {
  select.replaceChildren(...texts.map((text, i) => el("option", { value: values[i] }, text.length > 90 ? `${text.slice(0, 90)}…` : text)));
}

function radios(container, group, options, current, change) {
  container.replaceChildren(...options.map(([value, text]) => {
    const input = el("input", { type: "radio", name: group, value, checked: value === current });
    input.addEventListener("change", () => change(value));
    return el("label", {}, input, text);
  }));
}

function drawQuantity() {
  const [name, formula, meaning] = QUANTITIES[state.quantity], most = shown.get(state.quantity), digits = state.quantity;
  radios($(".quantities"), "quantity", Object.entries(QUANTITIES).filter(([name]) => shown.has(name)).map(([name, [text]]) => [name, text]), state.quantity, choose => { setQuantity(choose); $(`.quantities input[value=${choose}]`).focus(); });
  const scale = el("i");
  const side = state.quantity === "logprob" ? "var(--minus), var(--card)" : ["mask", "kl"].includes(state.quantity) ? "var(--card), var(--plus)" : "var(--minus), var(--card), var(--plus)";
  scale.style.background = `linear-gradient(to right, ${side})`;
  const ends = state.quantity === "logprob" ? [-most, 0] : ["mask", "kl"].includes(state.quantity) ? [0, most] : [-most, most];
  $(".legend").replaceChildren(signed(ends[0], 2, digits), scale, signed(ends[1], 2, digits), el("span", {}, "square root scale, the same for all answers"));
  let text = meaning;
  if (["value", "advantage", "return"].includes(state.quantity)) text += ` Here V was fitted after training: it explains ${models.map(m => `${(100 * m.explained).toFixed(0)}% (${names[m.name]})`).join(", ")} of the variance of the returns of new answers.`;
  $(".meaning").replaceChildren(el("b", {}, name), `, ${formula}. ${text}`);
}

function setQuantity(name) {
  state.quantity = name;
  draw();
}

/* Draws anew what depends on the quantity or the prompt, and picks the token again that was picked. */
function draw() {
  const rows = () => [...document.querySelectorAll(".strip")], row = rows().findIndex(row => row.contains(state.picked));
  const at = row < 0 ? -1 : [...rows()[row].children].indexOf(state.picked);
  drawQuantity();
  drawAnswers();
  drawCourse();
  drawTalk();
  rows()[row]?.children[at]?.click();
}

let timer;
function play() {
  clearInterval(timer);
  const last = runs[state.run].course.length - 1;
  const step = () => {
    state.step = Math.min(state.step + 1, last);
    drawCourse();
    if (state.step === last) clearInterval(timer);
  };
  state.step = matchMedia("(prefers-reduced-motion: reduce)").matches ? last : 0;
  drawCourse();
  timer = setInterval(step, 900);
}

function setRun(run) {
  state.run = run;
  state.step = 0;
  radios($(".runs"), "run", runs.map((m, i) => [i, titleOf(m)]), run, choose => { setRun(choose); $(`.runs input[value="${choose}"]`).focus(); });
  drawCourse();
}

/* Picks token i of a model's answer to the present prompt. */
function point(model, i) {
  const token = $("#answers .cards").children[models.indexOf(model)].querySelectorAll(".token")[i];
  token.click();
  return token;
}

/* Three things to see, each a click away, as far as the models are there: [title, what to do, what to say]. */
function lessons() {
  const tuned = models.find(m => m.method === "ppo" && m.beta > 0) ?? models.findLast(m => !isReference(m)), found = [];
  const free = runs.findIndex(m => m.method === "ppo" && m.beta === 0);
  if (tuned && shown.has("reward")) {
    const answer = () => tuned.answers[state.prompt], most = () => Math.max(...answer().columns.ratio);
    found.push(["Why the end token gets the score",
      () => { setQuantity("reward"); return point(tuned, answer().ids.length - 1); },
      () => `Look at the answer of ${names[tuned.name]}: every token but the last gets only its small KL penalty, and the last one gets the whole score. For the reward model reads finished answers: before the end there is nothing to judge. GAE then hands this one number back to the tokens that earned it: choose return, then advantage.`]);
    found.push(["What β costs each token",
      () => { setQuantity("penalty"); return point(tuned, answer().columns.ratio.indexOf(most())); },
      () => `This token costs most: ${names[tuned.name]} finds it ${Math.exp(most()).toFixed(1)} times as likely as the reference does, and pays β × log of that = ${tuned.beta} × ${most().toFixed(2)} nats. Most tokens cost nothing: a few choices have changed, and the rest follows as before.`]);
  }
  if (free >= 0) found.push(["How it goes wrong without a penalty",
    () => { setQuantity(shown.has("ratio") ? "ratio" : "logprob"); setRun(free); pick(null); play(); return $("#course"); },
    () => `${names[runs[free].name]} was trained with β = 0. Watch the score rise while the gold reward falls: the reward model has never seen such texts, so what it says of them means nothing. The log-ratios tell at once: blue are tokens that the reference would hardly have written, more and more of them.`]);
  $("#lessons .buttons").replaceChildren(...found.map(([text, show, say], i) => {
    const button = el("button", { type: "button" }, `${i + 1}. ${text}`);
    button.addEventListener("click", () => {
      const place = show();
      $(".lesson").textContent = say();
      $("#detail").hidden = false;
      place.scrollIntoView({ block: place.tagName === "SECTION" ? "start" : "center" });
    });
    return button;
  }));
  if (found.length && !matchMedia("(max-width: 56rem)").matches) { // a narrow page begins without the panel over it
    found[0][1]();
    $(".lesson").textContent = found[0][2]();
  } else pick(null);
}

function hide(section, sentence) {
  const element = $(section);
  element.replaceChildren(element.querySelector("h2"), el("p", {}, sentence));
}

fill($("#prompt"), data.prompts.map(ids => textOf(ids.slice(1, -1))));
$("#prompt").addEventListener("change", event => { state.prompt = Number(event.target.value); draw(); });
if (runs.length) {
  const first = runs.findLastIndex(m => m.method === "ppo" && m.beta > 0);
  setRun(Math.max(0, first));
  $("#step").addEventListener("input", event => { clearInterval(timer); state.step = Number(event.target.value); drawCourse(); });
  $("#play").addEventListener("click", play);
} else hide("#course", "None of these runs has kept copies: train with --keep-every 5.");
if (data.demonstrations.length) {
  fill($("#record"), data.demonstrations.map(({ ids, mask }) => textOf(ids.slice(1, mask.indexOf(true) - 1))));
  fill($("#sft-model"), models.map(m => names[m.name]));
  $("#sft-model").value = Math.max(0, models.findIndex(m => m.method === "sft" && isReference(m)));
  for (const id of ["#record", "#sft-number", "#sft-model"]) $(id).addEventListener("change", drawDemonstration);
  drawDemonstration();
} else hide("#sft", "There are no demonstrations: give --demonstrations.");
if (data.pairs.length) {
  fill($("#pair"), data.pairs.map(({ prompt }) => textOf(prompt.slice(1, -1))));
  fill($("#dpo-model"), models.map(m => names[m.name]), models.map(m => m.name));
  $("#dpo-model").value = (models.find(m => m.method === "dpo") ?? models.at(-1)).name;
  for (const id of ["#pair", "#dpo-model"]) $(id).addEventListener("change", drawPair);
  drawPair();
} else hide("#dpo", "There are no pairs: give --pairs, and --reference.");
if (embedded.length) {
  fill($("#draw"), data.noise.map((_, i) => `no. ${i + 1}`));
  $("#talk form").addEventListener("submit", event => { event.preventDefault(); ask(); });
  $("#typed").addEventListener("keydown", event => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); ask(); } });
  $("#temperature").addEventListener("input", event => { $("#talk output").textContent = event.target.value; });
  const left = models.filter(m => !m.bits).map(m => names[m.name]);
  if (left.length) $("#talk > p").append(` Too large for this page: ${left.join(", ")}.`);
} else hide("#talk", "These models are too large for a page: nanopost chat talks to them.");
$("#close").addEventListener("click", () => { $(".lesson").textContent = ""; pick(null); });
draw();
lessons();
