// Keeps an open page fresh and streams the console's answers. The page works without it.

const EVERY_MS = 2000;
const live = document.querySelector("#live");
const state = document.querySelector("#state");
const pause = document.querySelector("#pause");
const form = document.querySelector("#ask");
const answer = document.querySelector("#answer");
let paused = false;

// Puts new sections in place of those that differ. What is open, scrolled or focused stays so; a section in which
// somebody types or is about to press a button stays as it is.
function put(html) {
  const next = new DOMParser().parseFromString(html, "text/html");
  for (const section of next.querySelectorAll("section[id]")) {
    const old = document.getElementById(section.id);
    if (!old || old.outerHTML === section.outerHTML || busy(old)) continue;
    for (const open of old.querySelectorAll("details[open][id]")) {
      section.querySelector(`#${CSS.escape(open.id)}`)?.setAttribute("open", "");
    }
    const focused = old.contains(document.activeElement) ? document.activeElement : null;
    const details = focused?.closest("details[id]");
    const scrolled = old.querySelector(".scroll")?.scrollLeft ?? 0;
    old.replaceWith(section);
    if (scrolled) section.querySelector(".scroll")?.scrollTo({ left: scrolled });
    if (details) section.querySelector(`#${CSS.escape(details.id)} > summary`)?.focus({ preventScroll: true });
    else if (focused) section.querySelector(".scroll")?.focus({ preventScroll: true });
  }
}

function busy(section) {
  const fields = [...section.querySelectorAll("input:not([type=hidden]), button")];
  return fields.some((field) => field === document.activeElement || (field.matches("input") && field.value));
}

async function refresh() {
  if (!paused && !document.hidden) {
    try {
      const response = await fetch("/fragment", { redirect: "error" });
      if (response.status === 401) {
        location.assign("/login");
        return;
      }
      if (!response.ok) throw new Error(`status ${response.status}`);
      put(await response.text());
      state.textContent = "live";
    } catch (error) {
      state.textContent = `not fresh: ${error.message}`;
    }
  }
  setTimeout(refresh, EVERY_MS);
}

pause.hidden = false;
pause.addEventListener("click", () => {
  paused = !paused;
  pause.setAttribute("aria-pressed", String(paused));
  pause.textContent = paused ? "Go on" : "Pause";
  state.textContent = paused ? "paused" : "live";
});

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = form.querySelector("button");
  button.disabled = true;
  const question = document.createElement("p");
  question.className = "question";
  question.textContent = form.elements.text.value;
  answer.replaceChildren(question);
  try {
    const response = await fetch(form.action, {
      method: "POST",
      headers: { accept: "text/event-stream" },
      body: new URLSearchParams(new FormData(form)),
    });
    if (!response.ok) throw new Error(`The server refused (status ${response.status}). Reload the page.`);
    for await (const [name, data] of events(response.body)) {
      if (name === "item") answer.insertAdjacentHTML("beforeend", data.html); // rendered and escaped by the server
    }
    form.elements.text.select();
  } catch (error) {
    const problem = document.createElement("p");
    problem.className = "notice bad";
    problem.setAttribute("role", "alert");
    problem.textContent = error.message;
    answer.append(problem);
  } finally {
    button.disabled = false;
  }
});

// Server-sent events as [name, data].
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const fields = Object.fromEntries(part.split("\n").map((line) => line.split(/: (.*)/s).slice(0, 2)));
      yield [fields.event, JSON.parse(fields.data)];
    }
  }
}

setTimeout(refresh, EVERY_MS);
