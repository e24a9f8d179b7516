// What the page does in the browser alone. `chatPage` is called by the events of chat_tab.py.
"use strict";

const chatPage = (() => {
  const JOINER = "\u2060";
  const WORDS = JOINER + "\u200b"; // as in page_text.py
  const box = () => document.querySelector("#message textarea");
  const stopButton = () => document.querySelector("#message .stop-button");
  let sendsWhenOpen = false;
  let underway = null; // the message that is on its way to the server

  // The characters of a message, as page_text.plain_text gives them to the model.
  function plainText(shown) {
    if (shown.startsWith(WORDS)) {
      return shown.slice(WORDS.length).replace(/&#(\d+);/g, (_, code) => String.fromCodePoint(Number(code)));
    }
    return shown.replace(/([<&!`])\u2060/g, "$1");
  }

  function write(area, text) {
    area.value = text;
    area.dispatchEvent(new Event("input", { bubbles: true }));
  }

  const isOpen = () => "open" in document.body.dataset; // what the browser kept, or a link gives, is on the page
  const isBusy = () => !isOpen() || underway !== null || stopButton() !== null;

  // Sending

  // Gradio reads the box some moments after Enter: what is typed by then belongs to the next message.
  function take(event) {
    const sends = event.type === "click" ? event.target.closest?.("#message .submit-button") : event.target === box() && event.key === "Enter" && !event.shiftKey;
    if (!sends) return;
    sendsWhenOpen = !isOpen();
    if (isBusy()) {
      event.preventDefault(); // the message stays in the box until the page is open, and the last reply is written
      event.stopImmediatePropagation();
    } else {
      underway = box().value;
      write(box(), "");
    }
  }
  for (const name of ["keypress", "click"]) window.addEventListener(name, take, true);

  function opened() {
    document.body.dataset.open = "";
    if (sendsWhenOpen) document.querySelector("#message .submit-button")?.click();
  }

  function send([typed, ...others]) {
    return [underway ?? typed, ...others];
  }

  function sent() {
    underway = null;
  }

  function takeBack() {
    const typed = box().value;
    write(box(), typed ? `${underway}\n${typed}` : underway);
    sent();
  }

  function focus() {
    box()?.focus();
  }

  window.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stopButton()?.click();
  });

  // Copying

  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(plainText(text));
  }
  document.addEventListener("copy", (event) => {
    const selected = String(getSelection());
    const isField = document.activeElement?.tagName === "TEXTAREA";
    const own = isField ? plainText(selected) : plainText(selected.replaceAll(WORDS, ""));
    if (own !== selected) {
      event.clipboardData.setData("text/plain", own);
      event.preventDefault();
    }
  });

  // A link that opens the page with the same settings and the first message
  async function copyLink(model, inputs) {
    const [history, system_prompt, temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed, greedy, compare] = inputs;
    const text = (message) => plainText(message.content.map?.((part) => part.text ?? "").join("") ?? message.content);
    const first = history?.find((message) => message.role === "user");
    const reply = history?.find((message) => message.role === "assistant");
    const settings = { temperature, top_p, top_k, repetition_penalty, max_new_tokens, greedy };
    const link = new URL(location.href);
    link.search = link.hash = "";
    link.searchParams.set("message", first ? text(first) : box().value);
    link.searchParams.set("model", model);
    for (const [name, value] of Object.entries(settings)) link.searchParams.set(name, value);
    link.searchParams.set("seed", reply?.metadata?.id ?? seed);
    if (system_prompt) link.searchParams.set("system_prompt", system_prompt);
    if (compare) link.searchParams.set("compare", true);
    await navigator.clipboard?.writeText(String(link));
    return [];
  }

  // What Gradio's elements lack for those who use a keyboard or a screen reader

  function mend() {
    for (const message of document.querySelectorAll("[data-testid=user][aria-label], [data-testid=bot][aria-label]")) {
      message.removeAttribute("aria-label"); // it repeats the message, in the page's own code
    }
    for (const part of document.querySelectorAll(".placeholder-content[role], .examples[role=list]")) {
      part.removeAttribute("role");
    }
    for (const part of document.querySelectorAll(".bubble-wrap:not([tabindex]), .prose table:not([tabindex])")) {
      part.tabIndex = 0; // it scrolls
    }
    for (const area of document.querySelectorAll("textarea.edit-textarea")) {
      if (area.value.startsWith(WORDS)) write(area, plainText(area.value));
    }
    const unnamed = document.querySelector("#message textarea:not([aria-label])");
    unnamed?.setAttribute("aria-label", "Message"); // Gradio hides a label that is not shown from everyone
    const note = document.querySelector("#note");
    const place = note?.querySelector(".progress-text")?.textContent.match(/queue: (\d+)\/(\d+)/);
    const waiting = place ? `Waiting: number ${place[1]} of ${place[2]} in the queue` : "";
    if (note && (note.dataset.waiting ?? "") !== waiting) note.dataset.waiting = waiting;
  }
  new MutationObserver(mend).observe(document, {
    subtree: true,
    childList: true,
    characterData: true,
    attributes: true,
    attributeFilter: ["aria-label"],
  });

  return { opened, send, sent, takeBack, focus, copyLink };
})();
