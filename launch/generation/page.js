"use strict";
const get = (id) => document.getElementById(id);
const PREVIEWS = 8;
let world = []; // parts of messages: what has happened so far

function fail(error) {
  get("problem").textContent = error.message || String(error);
}

/** POSTs a body and calls `tell` with the data of each server-sent event. */
async function stream(path, body, tell) {
  get("problem").textContent = "";
  const headers = { "Content-Type": "application/json" };
  if (get("token").value) headers.Authorization = `Bearer ${get("token").value}`;
  const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify({ ...body, stream: true }) });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const line = event.split("\n").find((one) => one.startsWith("data: "));
      if (!line || line === "data: [DONE]") continue;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new Error(data.error.message);
      tell(data);
    }
  }
}

const dataURL = (file) => new Promise((done, broken) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result);
  reader.onerror = () => broken(reader.error);
  reader.readAsDataURL(file);
});

/** A figure that shows pictures as they come, and words below. */
function figure(place) {
  const frame = document.createElement("figure");
  const image = document.createElement("img");
  const words = document.createElement("figcaption");
  image.alt = "";
  frame.append(image, words);
  place.append(frame);
  return { frame, image, words };
}

async function draw(event) {
  event.preventDefault();
  const body = { prompt: get("prompt").value, size: get("size").value, partial_images: PREVIEWS };
  body.n = Number(get("count").value);
  if (get("seed").value) body.seed = Number(get("seed").value);
  const sources = [...get("sources").files];
  if (sources.length) body.images = await Promise.all(sources.map(async (file) => ({ image_url: await dataURL(file) })));
  get("pictures").replaceChildren();
  const shown = Array.from({ length: body.n }, () => figure(get("pictures")));
  await stream(sources.length ? "/v1/images/edits" : "/v1/images/generations", body, (data) => {
    const { frame, image, words } = shown[data.index];
    if (data.b64_json) image.src = `data:image/png;base64,${data.b64_json}`;
    if (data.rows) words.textContent = `${data.rows} of ${data.grid[0]} rows`;
    if (data.steps) words.textContent = `${data.step} of ${data.steps} steps`;
    if (data.nextstate) {
      const how = data.nextstate;
      words.textContent = `seed ${how.seed}, number ${how.index}: ${how.forwards} forwards, ${how.seconds.toFixed(1)} s`;
      frame.dataset.done = "yes";
      image.onclick = () => startWorld(image.src);
    }
  });
}

function startWorld(url) {
  world = [{ type: "image_url", image_url: { url } }];
  get("states").replaceChildren();
  figure(get("states")).image.src = url;
}

async function roll(event) {
  event.preventDefault();
  if (!world.length && get("frame").files.length) startWorld(await dataURL(get("frame").files[0]));
  if (!world.length) throw new Error("a world begins with a frame: choose one, or click a picture");
  const said = get("words").value;
  const next = figure(get("states"));
  const body = { messages: [{ role: "user", content: world }], format: "interleaved", states: 1 };
  if (said) body.words = [said];
  let heard = "";
  next.words.textContent = said;
  await stream("/v1/chat/completions", { ...body, partial_images: PREVIEWS }, (data) => {
    const delta = data.choices[0].delta;
    if (delta.content) next.words.textContent = [said, (heard += delta.content)].join(" ");
    if (delta.partial_image) next.image.src = delta.partial_image.url;
    for (const picture of delta.images || []) {
      next.image.src = picture.image_url.url;
      for (const text of [said, heard]) if (text) world.push({ type: "text", text });
      world.push({ type: "image_codes", codes: picture.codes });
      next.frame.dataset.done = "yes";
    }
  });
}

get("draw").addEventListener("submit", (event) => draw(event).catch(fail));
get("roll").addEventListener("submit", (event) => roll(event).catch(fail));
get("reset").addEventListener("click", () => { world = []; get("states").replaceChildren(); });
