// Python with edgeft's planner, from the parts of the page; what it would fetch is one of them or refused.
let python = null, answer = null, queue = [];

const unpacked = async (text) => {
  const raw = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Uint8Array(await new Response(new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer());
};
const module = (bytes) => import(URL.createObjectURL(new Blob([bytes], { type: "text/javascript" })));

async function start(parts) {
  const files = {};
  for (const [name, text] of Object.entries(parts)) files[name] = await unpacked(text);
  self.fetch = async (address) => {
    const name = String(address.url || address).split("/").pop();
    if (!(name in files)) throw new TypeError("this page fetches nothing: " + name);
    return new Response(files[name], { headers: { "content-type": name.endsWith(".wasm") ? "application/wasm" : "application/octet-stream" } });
  };
  const { default: createPyodideModule } = await module(files["pyodide.asm.mjs"]);
  const { loadPyodide } = await module(files["pyodide.mjs"]);
  const lockFileContents = new TextDecoder().decode(files["pyodide-lock.json"]);
  python = await loadPyodide({ indexURL: "https://this.page/", createPyodideModule, lockFileContents });
  python.unpackArchive(files["planner.zip"], "zip", { extractDir: "/planner" });
  // plans are for other machines: what this one has left is no limit of theirs
  python.FS.writeFile("/proc/meminfo", "MemAvailable: 1099511627776 kB\n");
  answer = python.runPython(`
import sys
sys.path.insert(0, "/planner")
from functools import partial
from pathlib import Path
from edgeft.reporting.planning_page import answer
partial(answer, configs=Path("/planner/examples/configs"))
`);
  self.postMessage({ ready: true });
  for (const each of queue.splice(0).slice(-1)) reply(each);
}

function reply({ number, request }) {
  const began = performance.now();
  self.postMessage({ number, answer: answer(request), milliseconds: performance.now() - began });
}

self.onmessage = ({ data }) => {
  if (data.parts) start(data.parts).catch((problem) => self.postMessage({ failed: String(problem.message || problem).slice(-600) }));
  else if (answer) reply(data);
  else queue.push(data);
};
