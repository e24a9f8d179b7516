// The page: what is said, and what the model in worker.js writes. `settings.json` has its words.
const settings = await (await fetch("settings.json")).json();
const worker = new Worker("worker.js", { type: "module" });
const part = (id) => document.getElementById(id);
const messages = [];
let isReady = false;
let reply = null; // the element of the reply that is being written
let began = 0;

const FAILURES = {
  load: "The model could not be loaded. Reload the page, or try another browser.",
  model: "The model failed. Your message is back in the box.",
  long: `That is more than the ${settings.context.toLocaleString("en")} tokens that the model reads. Your message is back in the box.`,
};

document.title = part("name").textContent = settings.name;
part("about").textContent = settings.about;
part("repo").href = settings.url;
part("message").placeholder = settings.answers ? "Write a message" : "Write the beginning of a text";
part("note").textContent = `Loading the model, ${settings.megabytes} MB, which your browser keeps`;

function say(role, text) {
  const element = document.createElement("p");
  element.className = `said ${role}`;
  element.textContent = text;
  part("conversation").append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

function show() {
  part("send").disabled = !isReady || reply !== null;
  part("send").hidden = reply !== null;
  part("stop").hidden = reply === null;
  part("clear").disabled = reply !== null;
}

function ask() {
  const text = part("message").value;
  if (!isReady || reply || !text.trim()) return;
  messages.push({ role: "user", content: text });
  say("user", text);
  part("message").value = "";
  reply = say("assistant", "");
  began = performance.now();
  show();
  worker.postMessage({
    messages: [...messages],
    answers: settings.answers,
    context: settings.context,
    greedy: part("greedy").checked,
    max_new_tokens: Math.min(512, Math.max(1, Number(part("longest").value) || 128)),
  });
}

// The focus returns to the message, but is not taken from whoever uses the page meanwhile.
function focusMessage() {
  const focused = document.activeElement;
  if (focused === document.body || focused === part("stop")) part("message").focus();
}

function finish() {
  messages.push({ role: "assistant", content: reply.textContent });
  reply = null;
  focusMessage();
  show();
}

function fail(kind) {
  part("note").textContent = FAILURES[kind];
  if (!reply) return;
  part("message").value ||= messages.pop().content;
  reply.previousSibling.remove();
  reply.remove();
  reply = null;
  show();
}

worker.onmessage = ({ data }) => {
  if (data.failed) return fail(data.failed);
  if (data.total) part("note").textContent = `Loading the model: ${Math.round((100 * data.loaded) / data.total)} %`;
  if (data.ready) {
    isReady = true;
    part("note").textContent = "";
    show();
  }
  if (data.text) reply.textContent += data.text;
  if (data.tokens) {
    const seconds = (performance.now() - began) / 1000;
    part("note").textContent = `${data.tokens} tokens written · ${(data.tokens / seconds).toFixed(1)} tokens/s`;
    reply?.scrollIntoView({ block: "end" });
  }
  if (data.done) finish();
};
worker.onerror = () => fail("load");

part("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
part("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
part("stop").addEventListener("click", () => worker.postMessage({ stop: true }));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") worker.postMessage({ stop: true });
});
part("clear").addEventListener("click", () => {
  messages.length = 0;
  part("conversation").replaceChildren();
  part("message").focus();
});
