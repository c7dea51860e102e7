"use strict";
(() => {
  const at = (name) => document.getElementById(name);
  const fields = ["model", "config", "machine", "gib", "length", "tuner", "base_precision", "device"];
  const numbers = ["gib", "length"];
  // by a data: address, since a page that was opened as a file may start no module from a blob
  const worker = new Worker("data:text/javascript;charset=utf-8," + encodeURIComponent(at("worker").textContent), { type: "module" });
  let asked = 0, answered = 0, ready = false, waiting = null;

  const request = () => {
    const made = {};
    for (const name of fields) {
      const value = at(name).value.trim();
      if (value === "" || (name === "config" && at("model").value)) continue;
      made[name] = numbers.includes(name) ? Number(value) : value;
    }
    return made;
  };
  const ask = () => {
    at("pasted").hidden = at("model").value !== "";
    if (!at("form").checkValidity()) { at("state").textContent = "Memory and length are numbers above 0."; return; }
    if (!at("model").value && !at("config").value.trim()) { at("state").textContent = "Paste the text of a config.json."; return; }
    if (!at("machine").value && !at("gib").value) { at("state").textContent = "Say how many GiB the card has."; return; }
    asked += 1;
    if (ready) { at("state").textContent = "Planning\u2026"; at("answer").classList.add("old"); }
    worker.postMessage({ number: asked, request: JSON.stringify(request()) });
  };
  worker.onerror = (event) => { at("state").textContent = "The planner could not start: " + event.message; };
  worker.onmessage = ({ data }) => {
    if (data.failed) { at("state").textContent = "The planner could not start: " + data.failed; return; }
    if (data.ready) { ready = true; at("state").textContent = "Ready."; document.body.dataset.ready = "yes"; return; }
    if (data.number < asked) return; // a newer question is on its way
    answered = data.number;
    const answer = JSON.parse(data.answer);
    at("answer").innerHTML = answer.html; // escaped by the template that made it
    at("answer").classList.remove("old");
    at("command").textContent = answer.command;
    at("state").textContent = answer.state === "problem" ? "" : "Planned in " + (data.milliseconds / 1000).toFixed(1) + " s.";
    document.body.dataset.answer = data.answer;
    document.body.dataset.answered = String(answered);
  };
  at("form").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(ask, 250); });
  at("form").addEventListener("submit", (event) => event.preventDefault());
  at("copy").addEventListener("click", () => {
    const range = document.createRange();
    range.selectNodeContents(at("command"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    if (navigator.clipboard) navigator.clipboard.writeText(at("command").textContent).catch(() => {});
  });
  const parts = {};
  for (const node of document.querySelectorAll('script[type="text/plain"]')) if (node.id !== "worker") parts[node.id] = node.textContent;
  worker.postMessage({ parts });
})();
