// The REST service, as the page speaks to it: keys, errors in one line, pictures.

const KEY = "anomalyst-key";
export const PREFIX = "/api/v1";

export class ApiError extends Error {
  constructor(status, message, { retry = null, body = {} } = {}) {
    super(message);
    this.status = status;
    this.retry = retry;
    this.body = body;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (text) => sessionStorage.setItem(KEY, text),
  clear: () => sessionStorage.removeItem(KEY),
};

export function withQuery(path, values = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    if (value !== null && value !== undefined && value !== "") query.append(name, value);
  }
  const text = query.toString();
  return text ? `${path}?${text}` : path;
}

/** Ask the service; `as` is "json", "text", "blob", or "response" for all of it. */
export async function call(path, { method = "GET", json, body, type, as = "json", signal } = {}) {
  const headers = {};
  if (key.get()) headers["X-API-Key"] = key.get();
  if (json !== undefined) headers["Content-Type"] = "application/json";
  if (type) headers["Content-Type"] = type;
  const content = json === undefined ? body : JSON.stringify(json);
  const answer = await reach(path, { method, headers, body: content, signal });
  if (!answer.ok) throw await refusal(answer);
  if (as === "response") return answer;
  if (answer.status === 204) return null;
  return answer[as]();
}

async function reach(path, options) {
  const url = path.startsWith(PREFIX) ? path : PREFIX + path;
  try {
    const answer = await fetch(url, options);
    told(false);
    return answer;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    told(true);
    const words = "The station does not answer. Look whether it is running; what it acknowledged is kept.";
    throw new ApiError(0, words);
  }
}

function told(gone) {
  dispatchEvent(new CustomEvent("station-gone", { detail: gone }));
}

async function refusal(answer) {
  let body = {};
  try {
    body = await answer.json();
  } catch {
    body = {}; // a proxy's page, or nothing
  }
  const line = body.error || `The station answered ${answer.status} ${answer.statusText}`;
  if (answer.status === 401) dispatchEvent(new CustomEvent("key-needed", { detail: line }));
  const mend = answer.status === 403 ? ". Enter a key of that role (top right)." : "";
  const retry = Number(answer.headers.get("Retry-After")) || null;
  return new ApiError(answer.status, `${capital(line)}${mend}`, { retry, body });
}

const capital = (line) => line.charAt(0).toUpperCase() + line.slice(1);

/** Let an `img` show an address of the service; with a key the browser cannot ask by itself. */
export async function showPicture(img, path) {
  img.dataset.path = path;
  if (!key.get()) {
    img.src = path;
    return;
  }
  try {
    const blob = await call(path, { as: "blob" });
    if (img.dataset.path !== path) return; // another one was asked for meanwhile
    const url = URL.createObjectURL(blob);
    img.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
    img.src = url;
  } catch {
    img.dispatchEvent(new Event("error"));
  }
}

/** Save an address of the service as a file. */
export async function download(path, name) {
  const blob = await call(path, { as: "blob" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
