// The only script of the pages. Each form sends its fields to a route of the service and shows the result.
"use strict";

const page = document.body.dataset.page;
const one = (selector, parent = document) => parent.querySelector(selector);
const all = (selector, parent = document) => [...parent.querySelectorAll(selector)];
const submitOf = (form) => one("button:not([type])", form);
// The texts of the language that the service has chosen: its script's own, and a sentence for each message of the service.
const texts = JSON.parse(one("#texts").content.textContent);
const text = (name, gaps) => fill(texts.script[name], gaps);
// Fills in what is in braces: a gap, or else another text.
const fill = (known, gaps = {}) => known?.replace(/\{(\w+)\}/g, (_, name) => gaps[name] ?? text(name));
const language = document.documentElement.lang;
// With the region that the user prefers, which matters to dates.
const locale = navigator.languages.find((tag) => tag.split("-")[0] === language) ?? language;

// Returns the JSON response with its status added; the status is 0 when the service cannot be reached.
async function send(method, path, fields) {
  try {
    // Only JSON can carry a passkey.
    const json = fields?.credential && {"Content-Type": "application/json"};
    const body = json ? JSON.stringify(fields) : fields && new URLSearchParams(fields);
    // Without "manual", a browser would follow the logout's 302 with another DELETE.
    const response = await fetch(path, {method, body, headers: json || {}, redirect: "manual", cache: "no-store"});
    if (response.type === "opaqueredirect") return {status: 302};
    return {...await response.json(), status: response.status, wait: Number(response.headers.get("Retry-After"))};
  } catch {
    return {status: 0, message: text("unreachable")};
  }
}

// Shows a message of no kind, an "error", or what is "done".
function showStatus(form, message, kind = "") {
  const status = one("[role=status]", form);
  status.textContent = message;
  status.className = kind;
}

// The address to open after sign-in: the one in "return" if it is on this host or on a host that shares the cookie,
// otherwise the account page.
function destination() {
  try {
    const given = location.search.match(/[?&]return=(.*)/)[1];
    // nginx cannot encode the address. Then it is the rest of the query, including its own & and =. ingress-nginx encodes
    // what follows the host.
    const plain = /^(\/|[a-z]+:\/\/[^/?%]+([/?]|$))/i.test(given);
    const address = plain ? given : decodeURIComponent(given.split("&")[0]);
    const wanted = new URL(address, address.startsWith("/") ? location.origin : undefined);
    const domain = document.body.dataset.domain;
    const shared = domain && (wanted.hostname === domain || wanted.hostname.endsWith(`.${domain}`));
    // A development service has no https. Its cookie is sent to all ports of its host.
    const local = location.protocol === "http:" && wanted.hostname === location.hostname;
    const known = (wanted.origin === location.origin || shared || local) && wanted.protocol === location.protocol;
    return known && !wanted.username && !wanted.password ? wanted.href : "/account";
  } catch {
    return "/account";
  }
}

// An action takes the fields of its form and returns the text to show. The message of an error is shown in red.
const actions = {
  async login(fields) {
    requireSuccess(await send("POST", "/sessions", fields));
    await enter(destination());
  },

  async register(fields, form) {
    const response = requireSuccess(await send("POST", "/users", fields));
    if (response.message === "confirmation mailed") return text("confirm");
    showStatus(form, text("registered"));
    requireSuccess(await send("POST", "/sessions", fields));
    await enter(destination());
  },

  async forgot(fields, form) {
    const response = requireSuccess(await send("POST", "/reset_password", fields));
    openLink("reset", response.reset_token, response.email);
    form.parentElement.classList.add("over");
    one("#forgot h1").textContent = text("check");
    submitOf(form).textContent = text("again");
    return text("mailed", fields);
  },

  async reset(fields) {
    requireSuccess(await send("PUT", "/reset_password", {...fields, reset_token: link.get("token")}));
    leadToLogin(closeLink(), fields);
    return text("set");
  },

  async leave({forget}) {
    await signOut(forget ? "/sessions?forget=1" : "/sessions");
  },

  async create(fields) {
    requireSuccess(await send("PUT", "/users", {...fields, token: link.get("token")}));
    leadToLogin(closeLink(), fields);
    return text("confirmed");
  },

  async email(fields) {
    const response = requireSuccess(await send("POST", "/email", fields));
    openLink("change", response.token, response.email);
    return text("change");
  },

  async change(fields) {
    requireSuccess(await send("PUT", "/email", {...fields, token: link.get("token")}));
    closeLink();
    return text("renamed");
  },

  async logout() {
    await signOut("/sessions");
  },

  async others() {
    requireSuccess(await send("DELETE", "/sessions/others"));
    await showAccount();
    return text("ended");
  },

  async password(fields) {
    requireSuccess(await send("PUT", "/password", fields));
    await showAccount();
    return text("changed");
  },

  async begin(fields) {
    const {secret, uri, qr} = requireSuccess(await send("POST", "/totp", fields));
    showFactor("pending");
    one("#factor-key").textContent = secret.match(/.{1,4}/g).join(" ");
    one("#factor-link").href = uri;
    one("#factor-picture").hidden = !qr;
    if (qr) one("#factor-picture").src = qr;
    one("#confirm-otp").focus();
  },

  async confirm(fields) {
    const response = requireSuccess(await send("PUT", "/totp", fields));
    one("#codes").replaceChildren(...response.recovery_codes.map((code) => listItem(element("code", code))));
    one("#recovery-of").textContent = one("#who").textContent;
    const lines = [`${one("#site span:last-child").textContent}, ${one("#who").textContent}`, ...response.recovery_codes];
    one("#download").href = `data:text/plain;charset=utf-8,${encodeURIComponent(lines.join("\r\n"))}`;
    one("#recovery").hidden = false;
    showFactor("saving"); // hides the form with the key
    await showAccount();
    showFactor("saving"); // and that which turns it off
  },

  async off(fields) {
    requireSuccess(await send("DELETE", "/totp", fields));
    await showAccount();
    showStatus(one("#two-factor"), text("factor-off"), "done");
  },

  async token(fields) {
    const {token} = requireSuccess(await send("POST", "/tokens", fields));
    one("#token-name").value = "";
    await showTokens();
    showNewToken(token, fields);
  },

  async passkey() {
    await signInWithPasskey();
  },

  async enroll({name, ...fields}) {
    const options = requireSuccess(await send("POST", "/passkeys/options", fields));
    const credential = await askBrowser("create", options);
    requireSuccess(await send("POST", "/passkeys", {name, credential}));
    one("#passkey-name").value = "";
    stopOffering();
    await showAccount();
    showStatus(one("#passkeys"), text("passkey"), "done");
  },

  async discard(fields, form) {
    requireSuccess(await send("DELETE", `/passkeys/${form.dataset.id}`, fields));
    form.hidden = true;
    await showAccount();
    showStatus(one("#passkeys"), text("discarded"), "done");
  },

  async delete(fields) {
    requireSuccess(await send("DELETE", "/profile", fields));
    forgetUser();
    document.body.dataset.page = "login";
    showStatus(one("[data-action=login]"), text("deleted"), "done");
  },
};

// Opens the link that a mail would hold. Only a development service answers with the token.
function openLink(name, token, email) {
  if (token) location.assign(`/${name}#${new URLSearchParams({token, email})}`);
}

// Leaves the message of the form of this page, and the link below it as a button, which is returned.
function endForm() {
  const section = linked.parentElement;
  const anchor = one(".foot a, .button", section);
  section.classList.add("over");
  anchor.parentElement.replaceChildren(anchor);
  anchor.parentElement.classList.remove("foot");
  anchor.className = "button";
  return anchor;
}

// The link of this page is used. A reload or a way back must not offer it again.
function closeLink() {
  history.replaceState(null, "", location.pathname);
  return endForm();
}

// Has a link lead to the sign-in page, which fills in the email.
function leadToLogin(anchor, {email}) {
  anchor.href = email ? `/login#${new URLSearchParams({email})}` : "/login";
  anchor.textContent = submitOf(one("[data-action=login]")).textContent;
  anchor.parentElement.className = "";
}

// Returns a successful response, and throws an error with the text to show otherwise.
function requireSuccess(response) {
  if (response.status >= 200 && response.status < 400) return response;
  throw new Error(sentence(response), {cause: response.message});
}

// Returns what the page says for a message of the service. In the list of sentences, # stands for a number.
function sentence({message, wait = 0}) {
  const numbers = message.match(/\d+/g);
  const known = texts.messages[message.replace(/\d+/g, "#")];
  return fill(known, {when: relative(wait)})?.replace(/#/g, () => numbers.shift()) ?? message;
}

async function signOut(path) {
  const response = await send("DELETE", path);
  forgetUser();
  requireSuccess(response);
  location.assign("/login");
}

// Removes all that this page shows and stores about its user, also when the service cannot be reached. The form to sign
// out stays, so that it can be sent again.
function forgetUser() {
  sessionStorage.clear();
  one("#account")?.replaceChildren(one("#account h1"), one("[data-action=logout]"));
}

function element(name, content) {
  const created = document.createElement(name);
  created.textContent = content;
  return created;
}

function listItem(...parts) {
  const created = document.createElement("li");
  created.append(...parts);
  return created;
}

// Shows or hides the field for a one-time code, in a form that asks for it only where the service does.
function showCode(form, shown) {
  for (const code of all(":not([data-code]) > .code", form)) {
    code.hidden = !shown;
    one("input", code).required = shown;
    if (shown) one("input", code).focus();
  }
}

function showFactor(state) {
  for (const form of all("[data-factor]")) form.hidden = form.dataset.factor !== state;
}

// Shows a password in plain text, or hides it again.
function reveal(secret, shown) {
  const field = one("input", secret);
  const button = one("button", secret);
  field.type = shown ? "text" : "password";
  button.textContent = text(shown ? "hide" : "show");
  button.setAttribute("aria-label", `${button.textContent}: ${one(`label[for="${field.id}"]`).textContent}`);
}

// The fields that a message of the service, or its first word, refuses.
const REFUSED = {"wrong email or password": "[name=email], [name=password]", "wrong password": "[name=password]",
  "wrong one-time code": "[name=otp]", email: "[type=email]", name: "[name=name]",
  password: "[autocomplete=new-password]"};

// Marks the fields that the service refuses.
function mark(form, cause = "") {
  const refused = REFUSED[cause] ?? REFUSED[cause.split(" ")[0]] ?? "form";
  for (const field of all("input", form)) field.setAttribute("aria-invalid", field.matches(refused));
  one("[autocomplete=new-password][aria-invalid=true]", form)?.focus();
}

// Shows the part of the account page that the address names, or else the first.
function showPanel() {
  const panels = all(".panel").filter(({id}) => id !== "passkeys" || hasPasskeys);
  const chosen = panels.find(({id}) => `#${id}` === location.hash) ?? panels[0];
  for (const panel of panels) panel.hidden = panel !== chosen;
  for (const anchor of all("nav a")) anchor.setAttribute("aria-current", String(anchor.hash === `#${chosen.id}`));
  return chosen;
}

// Shows why the link of this page cannot be used, and returns the link to what can be done.
function refuse(message) {
  showStatus(linked, message, "error");
  linked.parentElement.classList.add("refused");
  return endForm();
}

async function showFormerEmail() {
  const {status, message, email} = await send("GET", "/profile");
  if (status === 200) one("#change-former").value = email;
  else if (status === 403) leadToLogin(refuse(text("elsewhere")), {});
  else showStatus(linked, sentence({message}), "error");
  linked.parentElement.classList.add("ready");
}

async function showAccount() {
  const response = await send("GET", "/sessions");
  if (!one("#onward")) return; // meanwhile the user has signed out, and this page shows nothing any more
  const {status, message, email = "", second_factor: factor = false, sessions = []} = response;
  // The service redirects to the sign-in page.
  if (["not logged in", "sign in with your second factor"].includes(message)) return location.reload();
  if (message === "set up a second factor first" && !location.hash) location.replace("#two-factor");
  // Only now is it known which panel that is, and a panel that is shown must not move.
  showPanel();
  one("#account").className = "ready";
  one("#onward").classList.toggle("waiting", status !== 200);
  one("#onward a").href = destination();
  one("#who").textContent = status === 200 ? email : sentence(response);
  for (const field of all(".aside")) field.value = email;
  showFactor(factor ? "on" : "off");
  sessions.sort((a, b) => b.current - a.current || Date.parse(b.last_seen) - Date.parse(a.last_seen));
  one("#session-list").replaceChildren(...sessions.map(sessionItem));
  if (status !== 200) one("#offer").hidden = true;
  await showTokens();
  await showPasskeys();
}

// Most browsers also name those that they derive from, so the order matters.
const BROWSERS = {Edge: /\bEdg(A|iOS)?\//, Opera: /\bOPR\//, Firefox: /\b(Firefox|FxiOS)\//, Chrome: /\b(Chrome|CriOS)\//,
  Safari: /\bVersion\/.*\bSafari\//};
const SYSTEMS = {Android: /\bAndroid\b/, iOS: /\b(iPhone|iPad)\b/, Windows: /\bWindows NT\b/, macOS: /\bMacintosh\b/,
  ChromeOS: /\bCrOS\b/, Linux: /\bLinux\b/};

// Returns "Firefox on Windows" for a User-Agent header, or the header where it is of no well-known browser.
function browserName(header) {
  const [browser, system] = [BROWSERS, SYSTEMS].map((known) => Object.keys(known).find((name) => known[name].test(header)));
  return browser && system ? text("browser", {browser, system}) : header || text("unknown");
}

function sessionItem({id, address, user_agent: header, last_seen: seen, current}) {
  const name = browserName(header);
  const parts = current ? [element("mark", text("this")), ` · ${address}`] : [`${address} · ${text("seen")} `, time(seen)];
  const shown = row(name, ...parts);
  if (header && name !== header) {
    const whole = document.createElement("details");
    whole.append(element("summary", text("details")), element("small", header));
    shown.append(whole);
  }
  return current ? listItem(shown) : listItem(shown, removal(text("end"), `${name}, ${address}`, `/sessions/${id}`));
}

// Returns the name of an item of a list, with details below.
function row(name, ...details) {
  const shown = document.createElement("div");
  const small = document.createElement("small");
  small.append(...details);
  shown.append(element("strong", name), small);
  return shown;
}

// Most people have none, so the list is requested when its part of the page is opened.
async function showTokens() {
  if (one("#tokens").hidden) return;
  const {tokens = []} = await send("GET", "/tokens");
  one("#token-list").replaceChildren(...tokens.map(tokenItem));
}

// Shows a new token, or none any more.
function showNewToken(token, fields) {
  one("#token-secret").textContent = token;
  one("#new-token").hidden = !token;
  one("#new-token p").textContent = token && text("token", fields);
  one(token ? "#new-token button" : "#token-name").focus();
}

const lastUsed = (used) => (used ? [`${text("seen")} `, time(used)] : [text("unused")]);

function tokenItem({id, name, last_used: used, expires}) {
  const details = expires ? [` · ${text("expires")} `, time(expires)] : [];
  return listItem(row(name, ...lastUsed(used), ...details), removal(text("remove"), name, `/tokens/${id}`, text("sure")));
}

// Passkeys (https://www.w3.org/TR/webauthn-3/). They belong to one host: a page under another name does not offer them.

const hasPasskeys = "PublicKeyCredential" in window && document.body.dataset.passkeys === location.hostname;
const RENEWAL = 240_000; // milliseconds: a challenge expires after five minutes
// The question that the browser has open: its AbortController, and the timer that replaces its challenge.
const asked = {};

const decode = (text) =>
  Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (letter) => letter.charCodeAt(0));
const encode = (buffer) =>
  btoa(String.fromCharCode(...new Uint8Array(buffer))).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");

// Has the browser "create" a passkey or "get" the answer of one, and returns it as JSON. The browser's own conversions
// are not used: older ones have none, and some password managers break them.
async function askBrowser(method, options, mediation) {
  asked.controller?.abort(); // there can be only one
  clearTimeout(asked.renewal);
  asked.controller = new AbortController();
  if (mediation) asked.renewal = setTimeout(offerInField, RENEWAL);
  const publicKey = {...options, challenge: decode(options.challenge)};
  if (options.user) publicKey.user = {...options.user, id: decode(options.user.id)};
  publicKey.excludeCredentials = options.excludeCredentials?.map((held) => ({...held, id: decode(held.id)}));
  const {signal} = asked.controller;
  const {id, type, response} = await navigator.credentials[method]({publicKey, mediation, signal});
  const names = ["clientDataJSON", "attestationObject", "authenticatorData", "signature", "userHandle"];
  const given = names.filter((name) => response[name]).map((name) => [name, encode(response[name])]);
  return {id, rawId: id, type, response: Object.fromEntries(given), clientExtensionResults: {}};
}

async function signInWithPasskey(mediation) {
  const turn = asked.turn = (asked.turn ?? 0) + 1;
  const options = requireSuccess(await send("POST", "/sessions/passkey/options"));
  // Meanwhile somebody may have clicked the button, and must not lose that question to the one of the field.
  if (turn !== asked.turn) throw new DOMException("", "AbortError");
  const credential = await askBrowser("get", options, mediation);
  const remember = one("#login [name=remember]").checked ? {remember: "1"} : {};
  requireSuccess(await send("POST", "/sessions/passkey", {credential, ...remember}));
  stopOffering();
  await enter(destination());
}

// Lets the browser offer passkeys in the field for the email. After an error it is not started again: where a browser
// refuses at once, that would be an endless loop. The button stays.
async function offerInField() {
  try {
    if (await PublicKeyCredential.isConditionalMediationAvailable?.()) await signInWithPasskey("conditional");
  } catch (error) {
    if (error.name === "AbortError") return; // by a later question
    clearTimeout(asked.renewal);
    if (error.cause) showStatus(one("[data-action=passkey]"), error.message, "error");
  }
}

// From now on the account page of this browser no longer offers to create a passkey.
function stopOffering() {
  localStorage.setItem("passkey", "known");
  for (const offer of all("#offer")) offer.hidden = true;
}

async function copy(button) {
  const target = one(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(target.innerText.replaceAll(" ", ""));
    button.textContent = text("copied");
  } catch {
    getSelection().selectAllChildren(target); // the browser forbids it, but the user can copy what is selected
  }
}

async function showPasskeys() {
  if (one("#passkeys").hidden) return;
  const {passkeys = []} = await send("GET", "/passkeys");
  one("#passkey-list").replaceChildren(...passkeys.map(passkeyItem));
}

function passkeyItem({id, name, last_used: used, synced}) {
  const button = element("button", text("remove"));
  button.setAttribute("aria-label", `${text("remove")} ${name}`);
  button.addEventListener("click", () => {
    const form = one("[data-action=discard]");
    form.dataset.id = id;
    form.hidden = false;
    one("#discarded").textContent = name;
    one("[name=password]", form).focus();
  });
  return listItem(row(name, ...lastUsed(used), synced ? ` · ${text("synced")}` : ""), button);
}

const UNITS = Object.entries({year: 31_536_000, day: 86_400, hour: 3600, minute: 60, second: 1});

// Returns "in 40 seconds" or, for a negative number, "40 seconds ago".
function relative(seconds) {
  const [unit, size] = UNITS.find(([, size]) => Math.abs(seconds) >= size) ?? UNITS.at(-1);
  return new Intl.RelativeTimeFormat(locale, {numeric: "auto"}).format(Math.ceil(seconds / size), unit);
}

function time(stamp) {
  const created = element("time", relative((Date.parse(stamp) - Date.now()) / 1000));
  created.title = new Date(stamp).toLocaleString(locale, {dateStyle: "full", timeStyle: "short"});
  return created;
}

// Returns a button that sends DELETE for one item of a list and shows the lists again. With a question, it asks once before.
function removal(label, item, path, question) {
  const button = element("button", "");
  const name = (shown) => {
    button.textContent = shown;
    button.setAttribute("aria-label", `${shown} ${item}`);
    button.classList.toggle("danger", shown === question);
  };
  name(label);
  button.addEventListener("blur", () => name(label));
  button.addEventListener("click", async () => {
    if (question && button.textContent !== question) return name(question);
    const panel = button.closest(".panel");
    const response = await send("DELETE", path);
    const isDone = response.status === 200;
    if (response.status) await showAccount();
    showStatus(panel, isDone ? "" : sentence(response), "error");
  });
  return button;
}

// The account page redirects a visitor without a session. A browser would report a 401 in its console.
async function hasSession() {
  return (await fetch("/account", {method: "HEAD", redirect: "manual", cache: "no-store"}).catch(() => ({}))).ok;
}

// Returns the next address for a visitor with a session. A visitor who returns here within 10 s gets the account page,
// because the application would redirect back here in an endless loop. That happens when a second cookie is sent to
// the application only: the service accepts neither of two users' sessions. A checksum of the address is stored, because
// the address may be confidential.
function nextAddress() {
  const [last, at] = (sessionStorage.getItem("onward") ?? "").split(" ");
  const checksum = [...location.search].reduce((sum, letter) => (31 * sum + letter.codePointAt(0)) % 9973, 7);
  sessionStorage.setItem("onward", `${checksum} ${Date.now()}`);
  return last === String(checksum) && Date.now() - at < 10_000 ? `/account${location.search}` : destination();
}

// A user who must set up two-factor authentication first gets the account page, because the application would redirect
// back here in an endless loop.
async function enter(address) {
  location.replace((await send("GET", "/verify")).status === 200 ? address : `/account${location.search}`);
}

// The forms that ask for the password again have the same fields, with ids of their own.
for (const place of all("[data-ask]")) {
  place.append(one("#ask").content.cloneNode(true));
  for (const field of all("[name]", place)) {
    field.id = `${place.dataset.ask}-${field.name}`;
    one(`[data-for=${field.name}]`, place).htmlFor = field.id;
  }
  one("[name=otp]", place).required = "code" in place.dataset;
  one(".code", place).hidden = !("code" in place.dataset);
}
for (const secret of all(".secret")) {
  const button = element("button", "");
  button.type = "button";
  button.className = "show";
  button.addEventListener("click", () => reveal(secret, one("input", secret).type === "password"));
  secret.append(button);
  reveal(secret, false);
}
for (const field of all("[autocomplete=new-password]")) {
  one(".rule", field.form).id = `${field.id}-rule`;
  one("[role=status]", field.form).id = `${field.id}-status`;
  // The reason of a refusal, and the rule.
  field.setAttribute("aria-describedby", `${field.id}-status ${field.id}-rule`);
  field.minLength = document.body.dataset.minimum;
  field.setAttribute("passwordrules", `minlength: ${field.minLength};`); // what password managers read
}

for (const form of all("form")) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = submitOf(form);
    if (button.disabled) return;
    button.disabled = true;
    for (const secret of all(".secret", form)) reveal(secret, false); // a password manager must find a password
    showStatus(form.closest(".panel") ?? form, ""); // of an earlier form
    showStatus(form, text("working"));
    mark(form);
    try {
      const message = (await actions[form.dataset.action](Object.fromEntries(new FormData(form)), form)) ?? "";
      showStatus(form, message, message && "done");
      for (const field of all(".secret input, [name=otp]", form)) field.value = "";
      showCode(form, false);
    } catch (error) {
      // A browser's own errors have a name that says more than their message.
      const own = error instanceof DOMException && (text(error.name) ?? text("failed", {name: error.name}));
      const asks = error.cause === "one-time code required";
      showStatus(form, own || error.message, asks ? "" : "error");
      mark(form, error.cause);
      if (/^invalid (reset|confirmation) token$/.test(error.cause)) refuse(error.message);
      if (asks) showCode(form, true);
    }
    button.disabled = false;
  });
}

// First of all, the token is removed from the address bar, and so from the history. A reload finds it in the state of this
// entry, which only this page can read.
const linked = one(`#${page}:is(#reset, #confirm, #change) form`);
if (linked && location.hash) history.replaceState(location.hash.slice(1), "", location.pathname);
const link = new URLSearchParams((linked && history.state) ?? "");
if (linked) {
  one("[name=email]", linked).value = link.get("email") ?? "";
  const complete = link.get("token") && link.get("email");
  if (!complete) refuse(text("incomplete"));
  if (complete && page === "change") showFormerEmail();
  else linked.parentElement.classList.add("ready");
}
if (document.body.dataset.confirm === "on") one("#register-secret")?.remove();
if (page === "logout" && location.hash === "#forget") one("#logout [name=forget]").checked = true;
// An email in the operator's contact becomes a link.
for (const place of all(".contact")) {
  const [address] = place.textContent.match(/[\w.+-]+@[\w.-]*\w/) ?? [];
  if (!address) continue;
  const anchor = element("a", address);
  anchor.href = `mailto:${address}`;
  const [before, ...after] = place.textContent.split(address);
  place.replaceChildren(before, anchor, after.join(address));
}
for (const anchor of all("a[data-keep]")) anchor.search = location.search;
one("link[rel=icon]").href = one(".mark img")?.src ?? "data:,";
one("#language").value = language;
one("#language").addEventListener("change", ({target}) => {
  const [name, secure] = location.protocol === "https:" ? ["__Host-language", "; Secure"] : ["language", ""];
  document.cookie = `${name}=${target.value}; Path=/; Max-Age=31536000; SameSite=Lax${secure}`;
  location.reload();
});

if (page === "account") {
  for (const offered of all(".passkeys-only")) offered.hidden = !hasPasskeys;
  // Shown at once, so that the page does not move when the service has answered.
  one("#offer").hidden = !hasPasskeys || localStorage.getItem("passkey") !== null;
  one("#onward").hidden = !location.search;
  one("#accept").addEventListener("click", () => {
    history.pushState(null, "", "#passkeys");
    showPanel();
    showPasskeys();
    one("#passkey-name").focus();
  });
  one("#dismiss").addEventListener("click", stopOffering);
  for (const button of all("[data-copy]")) button.addEventListener("click", () => copy(button));
  one("#print").addEventListener("click", () => print());
  one("#done").addEventListener("click", () => showNewToken(""));
  one("#saved").addEventListener("click", () => {
    showFactor("on");
    one("#recovery").hidden = true;
    one("#codes").replaceChildren();
    one("#download").removeAttribute("href");
  });
  addEventListener("beforeunload", (event) => one("#codes code") && event.preventDefault());
  showPanel();
  showAccount();
}
if (page === "login") {
  one("[data-action=passkey]").hidden = !hasPasskeys;
  // After a reset it is in the address. A redirect from the account page keeps the name of one of its parts there.
  const email = new URLSearchParams(location.hash.slice(1)).get("email");
  history.replaceState(null, "", location.pathname + location.search);
  if (email) {
    one("#login-email").value = email;
    one("#login-password").focus();
  }
  hasSession().then((found) => found && enter(nextAddress()));
}
if (page === "login" && hasPasskeys) {
  offerInField();
  // A question that is still open would keep the next page from asking (iOS).
  addEventListener("pagehide", () => asked.controller?.abort());
  addEventListener("pageshow", (event) => event.persisted && offerInField());
}
addEventListener("hashchange", () => {
  if (page !== "account") return location.reload(); // a link that is opened in a tab that already shows this page
  one("h2", showPanel()).focus();
  showTokens();
  showPasskeys();
});
