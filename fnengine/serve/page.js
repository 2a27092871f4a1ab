// The page's whole program. Functions above the line are pure and tested by themselves; below it they touch the page.
// Nothing that a model or a user wrote is ever parsed as HTML: it goes in as text.

/** A function that takes pieces of a stream of events, cut anywhere, and gives the data of those that are complete. */
export function eventReader() {
  let rest = "";
  return (piece) => {
    rest += piece;
    const found = [];
    for (;;) {
      const end = /\r?\n\r?\n/.exec(rest);
      if (end === null) return found;
      const lines = rest.slice(0, end.index).split(/\r?\n/);
      rest = rest.slice(end.index + end[0].length);
      const data = lines.filter((l) => l.startsWith("data:")).map((l) => l.slice(5).replace(/^ /, ""));
      if (data.length) found.push(data.join("\n")); // comments, such as keep-alives, have none
    }
  };
}

/** Whether bytes end where a UTF-8 character ends. */
export function whole(bytes) {
  for (let back = 1; back <= Math.min(4, bytes.length); back++) {
    const b = bytes[bytes.length - back];
    if ((b & 0xc0) === 0x80) continue;
    const need = b < 0x80 ? 1 : b >= 0xf0 ? 4 : b >= 0xe0 ? 3 : b >= 0xc0 ? 2 : 1;
    return back >= need;
  }
  return true;
}

/**
 * A chunk's text cut by its tokens: [{text, tokens}], whose texts together are `content`, whatever the tokens are.
 * Tokens that share a character stand together; one that is not shown (an end, a stop string) gets no text.
 */
export function spansOf(content, entries) {
  const spans = [];
  let at = 0, held = [], bytes = [];
  const put = (text, tokens) => spans.push({ text, tokens });
  for (const entry of entries) {
    held.push(entry);
    bytes.push(...(entry.bytes ?? new TextEncoder().encode(entry.token)));
    if (!whole(bytes)) continue;
    const text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(bytes));
    const left = content.slice(at);
    // A tokenizer that marks words with a leading space drops the first one of an answer.
    const shown = left.startsWith(text) ? text : at === 0 && left.startsWith(text.trimStart()) ? text.trimStart() : "";
    put(shown, held);
    at += shown.length;
    held = [];
    bytes = [];
  }
  if (at < content.length || held.length) put(content.slice(at), held);
  return spans;
}

/** A class for how likely something was, from q0 (unlikely) to none (nearly certain). */
export function shade(logprob) {
  const p = Math.exp(logprob);
  return p < 0.05 ? "q0" : p < 0.15 ? "q1" : p < 0.35 ? "q2" : p < 0.6 ? "q3" : p < 0.85 ? "q4" : "";
}

/** 0.0312 as people read it. */
export function percent(p) {
  return p === 0 ? "0 %" : p >= 0.0995 ? `${Math.round(100 * p)} %` : p >= 0.00095 ? `${(100 * p).toFixed(1)} %` : "< 0.1 %";
}

/** What stands in a token, with blanks that can be seen. */
export function visible(token) {
  return token.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "(nothing)";
}

/** [owner, blocks, owner, blocks, ...] written out, an owner a block. */
export function expand(lengths) {
  let n = 0;
  for (let i = 1; i < lengths.length; i += 2) n += lengths[i];
  const out = new Int32Array(n);
  for (let i = 0, at = 0; i < lengths.length; i += 2) out.fill(lengths[i], at, (at += lengths[i + 1]));
  return out;
}

/** The largest whole cell with which `blocks` of them fit into a rectangle, and how many stand in a row. */
export function grid(blocks, width, height) {
  let cell = Math.max(1, Math.floor(Math.sqrt((width * height) / Math.max(1, blocks))));
  while (cell > 1 && Math.ceil(blocks / Math.floor(width / cell)) * cell > height) cell--;
  return { cell, columns: Math.max(1, Math.floor(width / cell)) };
}

/** A hue for a name, the same every time, and never the blue of shared blocks. */
export function hue(name) {
  let h = 2166136261;
  for (let i = 0; i < name.length; i++) h = Math.imul(h ^ name.charCodeAt(i), 16777619);
  return (235 + (((h >>> 0) * 137.508) % 310)) % 360;
}

/** Sampling fields of a request body; an empty field is left out, so that the model's own default holds. */
export function sampling(values) {
  const out = {};
  for (const name of ["temperature", "top_p", "top_k", "min_p", "seed", "max_tokens"]) {
    const text = String(values[name] ?? "").trim();
    if (text !== "" && Number.isFinite(Number(text))) out[name] = Number(text);
  }
  return out;
}

/** Seconds as people read them. */
export function seconds(s) {
  return s === null || s === undefined ? "–" : s >= 9.95 ? `${s.toFixed(0)} s` : s >= 0.0995 ? `${s.toFixed(2)} s` : `${(1000 * s).toFixed(1)} ms`;
}

/** The one line under an answer. */
export function facts(usage, timing, finish) {
  const out = [];
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    out.push(`${usage.completion_tokens} tokens`);
    out.push(`prompt ${usage.prompt_tokens}${cached ? `, ${cached} of it cached` : ""}`);
  }
  if (timing) {
    if (usage && timing.decode > 0 && usage.completion_tokens > 1) {
      out.push(`${((usage.completion_tokens - 1) / timing.decode).toFixed(1)} tokens/s`);
    }
    out.push(`queued ${seconds(timing.queued)}, prefill ${seconds(timing.prefill)}, decode ${seconds(timing.decode)}`);
    if (timing.preemptions) out.push(`preempted ${timing.preemptions} times`);
  }
  if (finish === "length") out.push("cut at the limit");
  if (finish === "stopped") out.push("stopped");
  return out.join(" · ");
}

// --- the page --------------------------------------------------------------------------------------------------------

const $ = (id) => document.getElementById(id);
const element = (tag, className, text) => {
  const e = document.createElement(tag);
  if (className) e.className = className;
  if (text !== undefined) e.textContent = text;
  return e;
};

let key = ""; // in this variable and nowhere else
let messages = [];
let running = null; // the AbortController of the answer that is coming
let longest = null; // tokens of a sequence, prompt and answer together
let last = null; // what /debug/state said last
let owners = new Int32Array(0);

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(path, body, signal) {
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...(body && { "content-type": "application/json" }) };
  const options = { headers, signal, cache: "no-store", credentials: "omit" };
  const answer = await fetch(path, body ? { ...options, method: "POST", body: JSON.stringify(body) } : options);
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  if (answer.status === 401) askForKey();
  throw new Refused(answer.status, told?.error?.message ?? `the server answered ${answer.status}`);
}

function askForKey() {
  if (!$("door").hidden) return;
  $("door").hidden = false;
  $("key").focus();
}

async function meet() {
  const { data } = await (await call("v1/models")).json();
  $("door").hidden = true;
  const chosen = $("model").value;
  $("model").replaceChildren(...data.map((m) => new Option(m.id, m.id, false, m.id === chosen)));
  longest = data[0]?.max_model_len ?? null;
}

function near(e) {
  return e.scrollHeight - e.scrollTop - e.clientHeight < 60;
}

function turn(role, text) {
  $("welcome").hidden = true;
  const box = element("div", `turn ${role}`);
  const said = element("p", "said", text);
  box.append(said);
  $("log").append(box);
  $("log").scrollTop = $("log").scrollHeight;
  return { box, said };
}

function show(said, content, entries) {
  const stay = near($("log"));
  if (!entries) said.append(content);
  else {
    for (const span of spansOf(content, entries)) {
      const e = element("span", span.tokens.length ? "t" : "", span.text);
      if (span.tokens.length) {
        const least = Math.min(...span.tokens.map((t) => t.logprob));
        if (shade(least)) e.classList.add(shade(least));
        e.tokens = span.tokens;
      }
      said.append(e);
    }
  }
  if (stay) $("log").scrollTop = $("log").scrollHeight;
}

function body() {
  const values = Object.fromEntries(["temperature", "top_p", "top_k", "min_p", "seed", "max_tokens"].map((n) => [n, $(n).value]));
  const system = $("system").value.trim();
  const all = system ? [{ role: "system", content: system }, ...messages] : messages;
  const likely = $("likely").checked ? { logprobs: true, top_logprobs: 5 } : {};
  const model = $("model").value ? { model: $("model").value } : {};
  return { ...model, messages: all, n: 1, stream: true, stream_options: { include_usage: true }, timing: true, ...likely, ...sampling(values) };
}

async function answer() {
  const mine = messages; // clearing begins another list, and what was asked before is no part of that
  const abort = (running = new AbortController());
  busy(true);
  const { box, said } = turn("assistant going", "");
  let text = "", usage = null, timing = null, finish = null, problem = null;
  try {
    const response = await call("v1/chat/completions", body(), abort.signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const read = eventReader();
    for (let over = false; !over; ) {
      const { value, done } = await reader.read();
      if (done) break;
      for (const data of read(value)) {
        if (data === "[DONE]") {
          over = true;
          break;
        }
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refused(200, chunk.error.message);
        usage = chunk.usage ?? usage;
        timing = chunk.timing ?? timing;
        for (const choice of chunk.choices) {
          const content = choice.delta?.content ?? "";
          text += content;
          const entries = choice.logprobs?.content;
          if (content || entries?.length) show(said, content, entries);
          finish = choice.finish_reason ?? finish;
        }
      }
    }
  } catch (e) {
    if (abort.signal.aborted) finish = "stopped";
    else problem = e.message;
  }
  running = null;
  busy(false);
  if (messages !== mine) return;
  box.classList.remove("going");
  if (text || problem === null) {
    messages.push({ role: "assistant", content: text });
    box.append(element("p", "facts", facts(usage, timing, finish)));
  } else box.remove();
  if (problem !== null) {
    turn("error", problem);
    if (!text) messages.pop(); // the question was not answered: it goes back where it can be sent again
    if (!text && !$("text").value) $("text").value = asked;
  }
  if (usage && longest) $("context").textContent = `${usage.total_tokens} of ${longest} tokens`;
  busy(false);
}

let asked = "";
function send() {
  const text = $("text").value.trim();
  if (!text || running) return;
  asked = text;
  $("text").value = "";
  messages.push({ role: "user", content: text });
  turn("user", text);
  answer();
}

function again() {
  if (running || messages.at(-1)?.role !== "assistant") return;
  messages.pop();
  asked = messages.at(-1).content;
  const turns = document.querySelectorAll("#log .turn.assistant");
  turns[turns.length - 1].remove();
  answer();
}

function clear() {
  running?.abort();
  messages = [];
  document.querySelectorAll("#log .turn").forEach((e) => e.remove());
  $("welcome").hidden = false;
  $("context").textContent = "";
  $("again").disabled = true;
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  $("again").disabled = yes || messages.at(-1)?.role !== "assistant";
}

/** The chat of a model that writes nothing: it says what the model does. */
function reads(tasks) {
  $("ask").hidden = true;
  $("welcome").replaceChildren(element("p", "", `This model reads texts and writes none. What may be asked of it: ${tasks.join(", ")}.`));
}

// --- tooltips

function place(x, y) {
  const tip = $("tip");
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - box.width - 4))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 10) : y + 18}px`;
}

function tellTokens(tokens, x, y) {
  const rows = [];
  for (const t of tokens) {
    const others = t.top_logprobs ?? [];
    const outside = others.every((o) => o.token !== t.token || o.logprob !== t.logprob);
    for (const o of outside ? [t, ...others] : others) {
      const row = element("tr", o.token === t.token && o.logprob === t.logprob ? "chosen" : "");
      row.append(element("td", "", visible(o.token)), element("td", "", percent(Math.exp(o.logprob))));
      rows.push(row);
    }
  }
  const table = element("table");
  table.append(...rows);
  $("tip").replaceChildren(table);
  place(x, y);
}

function tellBlock(event) {
  const c = $("pool");
  if (!last || !owners.length) return;
  const box = c.getBoundingClientRect();
  const { cell, columns } = grid(owners.length, box.width, box.height);
  const column = Math.floor((event.clientX - box.left) / cell);
  const at = column + columns * Math.floor((event.clientY - box.top) / cell);
  if (column >= columns || at >= owners.length) return hideTip();
  const owner = owners[at];
  const names = Object.fromEntries(Object.entries(last.pool.owners).map(([name, n]) => [n, name]));
  const row = last.requests[owner];
  $("tip").textContent = `block ${at + 1}: ${owner < 0 ? names[owner] : `request ${row.id}${row.choice ? `, choice ${row.choice}` : ""}`}`;
  place(event.clientX, event.clientY);
}

function hideTip() {
  $("tip").hidden = true;
  document.querySelectorAll(".held").forEach((e) => e.classList.remove("held"));
}

// --- the live view

async function look() {
  try {
    if (!document.hidden && $("door").hidden) {
      last = await (await call("debug/state")).json();
      draw(last);
    }
  } catch (e) {
    if (e.status !== 401) pulse("lost", e instanceof Refused ? e.message : "no connection");
  }
  setTimeout(look, 1000);
}

function pulse(state, text) {
  $("pulse").className = `pulse ${state}`;
  $("pulse").textContent = text;
}

function draw(s) {
  $("unseen").hidden = true;
  $("seen").hidden = false;
  const g = s.gauges;
  const stuck = s.standing !== null && s.standing > s.stuck_after;
  pulse(stuck ? "lost" : g.running ? "busy" : "idle", stuck ? `no step for ${seconds(s.standing)}` : g.running ? `${g.running} running` : "idle");
  const generated = s.steps.filter((x) => x.ago < 5);
  const numbers = {
    running: g.running,
    waiting: g.waiting,
    "pool held": percent(g.kv_usage),
    "wasted in it": percent(g.kv_waste),
    "prefix hits": g.prefix_queries ? percent(g.prefix_hits / g.prefix_queries) : "–",
    preemptions: g.preemptions,
    steps: g.steps,
    "tokens/s": generated.length > 1 ? (generated.reduce((a, x) => a + x.tokens, 0) / Math.max(0.5, generated[0].ago)).toFixed(0) : "0",
  };
  $("numbers").replaceChildren(
    ...Object.entries(numbers).map(([name, value]) => {
      const box = element("div");
      box.append(element("dt", "", name), element("dd", "", String(value)));
      return box;
    }),
  );
  owners = expand(s.pool.lengths);
  if (s.tasks && !s.tasks.includes("generate")) reads(s.tasks);
  $("pool-note").textContent = !g.blocks_total ? "none: texts are read whole" : `${g.blocks_total} blocks of ${s.pool.block} tokens; ${g.blocks_held} held, ${g.blocks_cached} cached`;
  drawPool(s);
  drawSteps(s.steps);
  drawRequests(s);
  drawGraphs(s.graphs);
}

function canvas(id) {
  const c = $(id);
  const { width, height } = c.getBoundingClientRect();
  const ratio = devicePixelRatio || 1;
  c.width = Math.round(width * ratio);
  c.height = Math.round(height * ratio);
  const context = c.getContext("2d");
  context.scale(ratio, ratio);
  return { context, width, height };
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const colourOf = (row) => `hsl(${hue(`${row.id}/${row.choice}`)} 55% 55%)`;

function drawPool(s) {
  const { context, width, height } = canvas("pool");
  const { cell, columns } = grid(owners.length, width, height);
  const gap = cell > 4 ? 1 : 0;
  const known = { "-1": colour("free"), "-2": colour("cached"), "-3": colour("shared"), "-4": colour("flight") };
  const colours = s.requests.map(colourOf);
  for (let i = 0; i < owners.length; i++) {
    const style = owners[i] < 0 ? known[owners[i]] : colours[owners[i]];
    if (context.fillStyle !== style) context.fillStyle = style;
    context.fillRect((i % columns) * cell, Math.floor(i / columns) * cell, cell - gap, cell - gap);
  }
}

function drawSteps(steps) {
  const { context, width, height } = canvas("steps");
  const most = Math.max(...steps.map((x) => x.seconds), 1e-6);
  const bar = width / 240;
  steps.forEach((x, i) => {
    context.fillStyle = colour(x.prompt_tokens ? "prefill" : "decode");
    const h = Math.max(1, (height * x.seconds) / most);
    context.fillRect(width - (steps.length - i) * bar, height - h, Math.max(1, bar - 0.5), h);
  });
  const sorted = steps.map((x) => x.seconds).sort((a, b) => a - b);
  const newest = steps.at(-1);
  $("steps-note").textContent = newest
    ? `median ${seconds(sorted[sorted.length >> 1])}, slowest ${seconds(most)}; the newest: tokens ${newest.tokens}, rows ${newest.rows}`
    : "none yet";
}

function drawRequests(s) {
  const more = s.unlisted ? `, and ${s.unlisted} more wait` : "";
  $("requests-note").textContent = s.requests.length ? more.slice(2) : "none";
  $("requests").tBodies[0].replaceChildren(
    ...s.requests.map((r) => {
      const row = element("tr");
      const swatch = element("td", "swatch");
      if (r.state !== "waiting") swatch.style.borderLeftColor = colourOf(r);
      const open = element("button", "", r.id + (r.choice ? ` #${r.choice}` : ""));
      open.type = "button";
      open.title = r.id;
      open.addEventListener("click", () => tellWay(r.id));
      const id = element("td");
      id.append(open);
      const state = r.waiting_for ? `waits for ${r.waiting_for}` : r.state;
      row.append(swatch, id);
      for (const v of [state, r.prompt, r.cached, `${r.generated} of ${r.max_tokens}`, r.blocks, r.preemptions]) row.append(element("td", "", String(v)));
      return row;
    }),
  );
}

async function tellWay(id) {
  const box = $("way");
  box.hidden = false;
  try {
    const told = await (await call(`debug/requests/${encodeURIComponent(id)}`)).json();
    const list = element("ol");
    for (const e of told.events) {
      const rest = Object.entries(e).filter(([k]) => k !== "after" && k !== "event").map(([k, v]) => `${k} ${typeof v === "number" ? +v.toFixed(3) : v}`);
      list.append(element("li", "", `${seconds(e.after)}: ${e.event}${rest.length ? ` (${rest.join(", ")})` : ""}`));
    }
    box.replaceChildren(element("div", "", `${told.id}: ${told.state}`), list);
  } catch (e) {
    box.replaceChildren(element("div", "", e.message));
  }
}

function drawGraphs(graphs) {
  $("graphs").hidden = graphs === null;
  if (graphs === null) {
    $("graphs-note").textContent = "no steps are captured on this device";
    return;
  }
  const eager = Object.entries(graphs.eager).map(([why, h]) => `${h.steps} eager (${why})`);
  $("graphs-note").textContent = [`${graphs.steps} steps, ${percent(graphs.waste)} padding`, ...eager].join("; ");
  $("graphs").tBodies[0].replaceChildren(
    ...graphs.buckets.filter((b) => b.steps).map((b) => {
      const row = element("tr");
      const meter = element("meter");
      meter.value = b.waste;
      meter.title = "share of padding";
      const cell = element("td");
      cell.append(meter);
      row.append(element("td", "", `${b.bucket[0]} × ${b.bucket[1]}`), element("td", "", String(b.steps)), element("td", "", percent(b.waste)), cell);
      return row;
    }),
  );
}

function start() {
  $("ask").addEventListener("submit", (e) => (e.preventDefault(), send()));
  $("text").addEventListener("keydown", (e) => {
    if (e.key === "Enter" && !e.shiftKey && !e.isComposing) {
      e.preventDefault();
      send();
    }
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("again").addEventListener("click", again);
  $("clear").addEventListener("click", clear);
  for (const chip of document.querySelectorAll(".chip")) {
    chip.addEventListener("click", () => {
      $("text").value = chip.textContent;
      send();
    });
  }
  for (const tab of document.querySelectorAll("[data-go]")) {
    tab.addEventListener("click", () => {
      document.body.dataset.tab = tab.dataset.go;
      if (last) draw(last);
    });
  }
  $("door").addEventListener("submit", (e) => {
    e.preventDefault();
    key = $("key").value.trim();
    $("key").value = "";
    $("door").hidden = true;
    meet().catch((error) => pulse("lost", error.message));
  });
  const overToken = (e) => {
    const token = e.target.closest?.(".t");
    if (!token?.tokens) return hideTip();
    hideTip();
    token.classList.add("held");
    tellTokens(token.tokens, e.clientX, e.clientY);
  };
  $("log").addEventListener("pointerover", overToken);
  $("log").addEventListener("click", overToken);
  $("log").addEventListener("pointerleave", hideTip);
  $("log").addEventListener("scroll", hideTip);
  $("pool").addEventListener("pointermove", tellBlock);
  $("pool").addEventListener("click", tellBlock);
  $("pool").addEventListener("pointerleave", hideTip);
  addEventListener("resize", () => last && draw(last));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => last && draw(last));
  meet().catch((e) => e.status !== 401 && pulse("lost", e.message));
  look();
}

if (typeof document !== "undefined") start();
