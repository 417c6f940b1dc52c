// The front page: asks the server every second what happened, and shows it. Texts that people typed
// only ever become text nodes.
"use strict";

const PERIOD = 1000; // milliseconds between two questions
const SILENCE = 10; // seconds without a tick until the page says so
const RECENT = 20; // seconds that a process counts as being at work

const byId = (id) => document.getElementById(id);
const shown = {};

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

const link = (text, href) => make("a", { href }, text);
const pid = (role, number) => make("span", { className: `pid ${role}` }, `${role} ${number}`);
const id = (text) => make("span", { className: "id", title: text }, text.slice(0, 8));
const trail = (...parts) => make("span", { className: "trail" }, ...parts);
const note = (...parts) => make("span", { className: "trail note" }, ...parts);
const aside = (text) => make("span", { className: "aside" }, text);
const clock = (text) =>
  make("time", { dateTime: text }, new Date(text).toLocaleTimeString([], { hour12: false }));

function order({ item, email, url, web_pid, receipt }) {
  const outcome = receipt
    ? ["→", pid("worker", receipt.pid), "→", link("receipt", receipt.url)]
    : ["→ waiting for a worker"];
  return make("li", {}, make("span", { className: "name" }, link(item, url)), aside(email),
    note(pid("web", web_pid), ...outcome));
}

function failedOrder({ item, task_id, web_pid, time, runs }) {
  return make("li", {}, make("span", { className: "name" }, item), aside(clock(time)),
    note(pid("web", web_pid), "→ rolled back"),
    note("Task", id(task_id), runs === 0 ? "was never sent: 0 runs" : `has run ${runs} times!`));
}

function report({ id: number, url, state, percent, pid: worker }) {
  const text = { PENDING: "waiting for a worker", PROGRESS: `${percent} %`, SUCCESS: "ready" };
  return make("li", {},
    make("span", { className: "name" }, link(`Report ${number}`, url)),
    trail(text[state] ?? state ?? "", worker ? pid("worker", worker) : null),
    make("progress", { max: 100, value: percent ?? 0, ariaLabel: `Report ${number}` }));
}

const tick = ({ time, pid: worker, sent_by }) =>
  make("li", {}, make("span", { className: "name" }, clock(time)),
    trail(pid("beat", sent_by), "→", pid("worker", worker)));

const run = ({ task, id: task_id, pid: worker, sent_by, time }) =>
  make("li", {}, make("span", { className: "name" }, task.split(".").pop()), id(task_id),
    trail(pid("web", sent_by), "→", pid("worker", worker)), clock(time));

function fill(name, rows, row, empty) {
  const key = JSON.stringify(rows);
  if (shown[name] === key) return; // nothing new: leave the page, and what is selected in it, alone
  shown[name] = key;
  const items = rows.map((each) => row(each));
  byId(name).replaceChildren(...(items.length ? items : [make("li", { className: "empty" }, empty)]));
}

async function ask(url, options = {}) {
  return fetch(url, { ...options, headers: { Accept: "application/json" } });
}

const finished = {}; // reports that change no more, by their address

async function progress(row) {
  if (finished[row.url]) return finished[row.url];
  const answer = await ask(row.url);
  if (!answer.ok) return { ...row, state: "unknown: no answer from the result backend" };
  const report = await answer.json();
  if (["SUCCESS", "FAILURE", "REVOKED"].includes(report.state)) finished[row.url] = report;
  return report;
}

function atWork(state) {
  const now = Date.parse(state.time);
  const recent = [...state.ticks, ...state.tasks_run]
    .filter((each) => now - Date.parse(each.time) < RECENT * 1000);
  const unique = (numbers) => [...new Set(numbers)].sort((a, b) => a - b);
  const beats = state.ticks.filter((each) => recent.includes(each)).map((each) => each.sent_by);
  return [
    ["web", [state.web_pid]],
    ["worker", unique(recent.map((each) => each.pid))],
    ["beat", unique(beats)],
  ].flatMap(([role, numbers]) => numbers.map((number) => ({ role, number })));
}

function silence(state) {
  const last = state.ticks.length ? Date.parse(state.ticks[0].time) : 0;
  if (Date.parse(state.time) - last < SILENCE * 1000) return "";
  return "No scheduled task has run lately. Are a worker and beat running? " +
    "“ws-celery dev --ini development.ini” starts them all.";
}

function say(text) {
  byId("trouble").textContent = text;
  byId("trouble").hidden = !text;
}

async function show() {
  const state = await (await ask(location.href)).json();
  fill("processes", atWork(state), ({ role, number }) => pid(role, number), "");
  fill("orders", state.orders.slice(0, 4), order, "No order yet.");
  fill("failed_orders", state.failed_orders.slice(0, 4), failedOrder, "Nothing has failed yet.");
  fill("ticks", state.ticks.slice(0, 5), tick, "No tick yet.");
  fill("tasks_run", state.tasks_run, run, "Nothing yet: place an order.");
  const reports = await Promise.all(state.reports.slice(0, 3).map(progress));
  fill("reports", reports, report, "No report yet.");
  say(silence(state));
}

let showing = null;

function refresh() {
  showing ??= show()
    .catch(() => say("The web process does not answer; trying again."))
    .finally(() => { showing = null; });
  return showing;
}

async function submit(event) {
  event.preventDefault();
  const form = event.currentTarget;
  const [button, problem] = [form.querySelector("button"), form.querySelector(".problem")];
  const expectsFailure = form.elements.fail !== undefined;
  button.disabled = true;
  try {
    const answer = await ask(form.action, {
      method: "POST", body: new URLSearchParams(new FormData(form)),
    });
    const failed = !answer.ok && !(expectsFailure && answer.status === 500);
    problem.textContent = failed ? (await answer.json()).error : "";
  } catch {
    problem.textContent = "The web process does not answer.";
  }
  problem.hidden = !problem.textContent;
  button.disabled = false;
  await refresh();
}

if (byId("processes")) {
  document.querySelectorAll("form").forEach((form) => form.addEventListener("submit", submit));
  refresh();
  setInterval(() => { if (!document.hidden) refresh(); }, PERIOD);
}
