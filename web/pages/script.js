// The only script of the pages. Each form sends its fields to a route of the service and shows the result.
"use strict";

const page = document.body.dataset.page;
const one = (selector, parent = document) => parent.querySelector(selector);
const all = (selector, parent = document) => [...parent.querySelectorAll(selector)];
const text = (name) => one("#texts").content.querySelector(`[data-text="${CSS.escape(name)}"]`)?.textContent;

// Returns the JSON response with its status added; the status is 0 when the service cannot be reached.
async function send(method, path, fields) {
  try {
    // Only JSON can carry a passkey.
    const json = fields?.credential && {"Content-Type": "application/json"};
    const body = json ? JSON.stringify(fields) : fields && new URLSearchParams(fields);
    // Without "manual", a browser would follow the logout's 302 with another DELETE.
    const response = await fetch(path, {method, body, headers: json || {}, redirect: "manual", cache: "no-store"});
    if (response.type === "opaqueredirect") return {status: 302};
    return {...await response.json(), status: response.status};
  } catch {
    return {status: 0, message: text("unreachable")};
  }
}

function showStatus(form, message, isError = false) {
  const status = one(".status", form);
  status.textContent = message;
  status.classList.toggle("error", isError);
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

  async forgot(fields) {
    const response = requireSuccess(await send("POST", "/reset_password", fields));
    openLink("reset", response.reset_token, response.email);
    return text("mailed");
  },

  async reset(fields, form) {
    requireSuccess(await send("PUT", "/reset_password", {...fields, reset_token: link.get("token")}));
    leadToLogin(form);
    return text("set");
  },

  async leave({forget}) {
    await signOut(forget ? "/sessions?forget=1" : "/sessions");
  },

  async create(fields, form) {
    requireSuccess(await send("PUT", "/users", {...fields, token: link.get("token")}));
    leadToLogin(form);
    return text("confirmed");
  },

  async email(fields) {
    const response = requireSuccess(await send("POST", "/email", fields));
    openLink("change", response.token, response.email);
    return text("change");
  },

  async change(fields, form) {
    requireSuccess(await send("PUT", "/email", {...fields, token: link.get("token")}));
    one("button", form).hidden = true;
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
    one("#recovery").hidden = false;
    showFactor("on");
    await showAccount();
  },

  async off(fields) {
    requireSuccess(await send("DELETE", "/totp", fields));
    one("#recovery").hidden = true;
    showFactor("off");
    await showAccount();
    showStatus(one("[data-action=begin]"), text("factor-off"));
  },

  async token(fields) {
    const {token} = requireSuccess(await send("POST", "/tokens", fields));
    one("#token-secret").textContent = token;
    one("#new-token").hidden = false;
    one("#token-name").value = "";
    await showTokens();
    return text("token");
  },

  async passkey() {
    await signInWithPasskey();
  },

  async enroll({name, ...fields}) {
    const options = requireSuccess(await send("POST", "/passkeys/options", fields));
    const credential = await askBrowser("create", options);
    requireSuccess(await send("POST", "/passkeys", {name, credential}));
    stopOffering();
    await showAccount();
    return text("passkey");
  },

  async discard(fields, form) {
    requireSuccess(await send("DELETE", `/passkeys/${form.dataset.id}`, fields));
    form.hidden = true;
    await showAccount();
    showStatus(one("[data-action=enroll]"), text("discarded"));
  },

  async delete(fields) {
    requireSuccess(await send("DELETE", "/profile", fields));
    forgetUser();
    document.body.dataset.page = "login";
    showStatus(one("[data-action=login]"), text("deleted"));
  },
};

// Opens the link that a mail would hold. Only a development service answers with the token.
function openLink(name, token, email) {
  if (token) location.assign(`/${name}#${new URLSearchParams({token, email})}`);
}

// Puts a link to the sign-in page in the place of a form's button.
function leadToLogin(form) {
  one("button", form).hidden = true;
  one("a", form.parentElement).href = "/login";
  one("a", form.parentElement).textContent = one("#login h1").textContent;
}

// Returns a successful response, and throws an error with the text to show otherwise.
function requireSuccess(response) {
  if (response.status >= 200 && response.status < 400) return response;
  throw new Error(text(`:${response.message}`) ?? response.message, {cause: response.message});
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
  one("#account").replaceChildren(one("#account h1"), one("[data-action=logout]"));
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
  for (const code of all(".code", form)) {
    code.hidden = !shown;
    one("input", code).required = shown;
    if (shown) one("input", code).focus();
  }
}

function showFactor(state) {
  for (const form of all("[data-factor]")) form.hidden = form.dataset.factor !== state;
}

// Shows why the link of this page cannot be used.
function refuse(name) {
  showStatus(linked, text(name), true);
  one("button", linked).disabled = true;
}

async function showFormerEmail() {
  const {status, message, email} = await send("GET", "/profile");
  if (status === 200) one("#change-former").value = email;
  else if (status === 403) refuse("elsewhere");
  else showStatus(linked, message, true);
}

async function showAccount() {
  const {status, message, email = "", second_factor: factor = false, sessions = []} = await send("GET", "/sessions");
  // The service redirects to the sign-in page.
  if (["not logged in", "sign in with your second factor"].includes(message)) return location.reload();
  one("#onward").hidden = !location.search || status !== 200;
  one("#onward a").href = destination();
  one("#who").textContent = status === 200 ? email : text(`:${message}`) ?? message;
  for (const field of all(".aside")) field.value = email;
  showFactor(factor ? "on" : "off");
  one("#sessions").replaceChildren(...sessions.map(sessionItem));
  one("#offer").hidden = !hasPasskeys || status !== 200 || localStorage.getItem("passkey") !== null;
  await showTokens();
  await showPasskeys();
}

function sessionItem(session) {
  const lastSeen = `${text("seen")} ${time(session.last_seen)}`;
  const details = element("small", `${session.user_agent} · ${lastSeen}`);
  if (session.current) return listItem(element("strong", `${session.address}, ${text("this")}`), details);
  const end = removal(text("end"), `${session.address}, ${lastSeen}`, `/sessions/${session.id}`);
  return listItem(element("span", `${session.address} `), end, details);
}

// Most people have none, so the list is requested when its part of the page is opened.
async function showTokens() {
  if (!one("#access").open) return;
  const {tokens = []} = await send("GET", "/tokens");
  one("#tokens").replaceChildren(...tokens.map(tokenItem));
}

function tokenItem({id, name, last_used: used, expires}) {
  const details = [used ? `${text("seen")} ${time(used)}` : text("unused")];
  if (expires) details.push(`${text("expires")} ${time(expires)}`);
  const remove = removal(text("remove"), name, `/tokens/${id}`);
  return listItem(element("span", `${name} `), remove, element("small", details.join(" · ")));
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
    if (error.cause) showStatus(one("[data-action=passkey]"), error.message, true);
  }
}

// From now on the account page of this browser no longer offers to create a passkey.
function stopOffering() {
  localStorage.setItem("passkey", "known");
}

async function showPasskeys() {
  if (!one("#passkeys").open) return;
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
  const details = [used ? `${text("seen")} ${time(used)}` : text("unused"), ...(synced ? [text("synced")] : [])];
  return listItem(element("span", `${name} `), button, element("small", details.join(" · ")));
}

function time(stamp) {
  return new Date(stamp).toLocaleString();
}

// Returns a button that sends DELETE for one item of a list and shows the lists again.
function removal(label, item, path) {
  const button = element("button", label);
  button.setAttribute("aria-label", `${label} ${item}`);
  button.addEventListener("click", async () => {
    await send("DELETE", path);
    await showAccount();
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

one("#access").addEventListener("toggle", showTokens);
one("#passkeys").addEventListener("toggle", showPasskeys);
one("#passkeys").hidden = one("[data-action=passkey]").hidden = !hasPasskeys;
one("#accept").addEventListener("click", () => {
  one("#passkeys").open = true;
  one("#passkey-name").focus();
});
one("#dismiss").addEventListener("click", () => {
  stopOffering();
  one("#offer").hidden = true;
});

for (const form of all("form")) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = one("button", form);
    if (button.disabled) return;
    button.disabled = true;
    showStatus(form, text("working"));
    try {
      showStatus(form, (await actions[form.dataset.action](Object.fromEntries(new FormData(form)), form)) ?? "");
      for (const field of all("[type=password], [name=otp]", form)) field.value = "";
      showCode(form, false);
    } catch (error) {
      // A browser's own errors have a name that says more than their message.
      const own = error instanceof DOMException && (text(error.name) ?? `${text("failed")} (${error.name}).`);
      showStatus(form, own || error.message, true);
      if (error.cause === "one-time code required") showCode(form, true);
    }
    button.disabled = false;
  });
}

// First of all, the token is removed from the address bar, and so from the history.
const linked = one(`#${page}:is(#reset, #confirm, #change) form`);
const link = new URLSearchParams(linked ? location.hash.slice(1) : "");
if (linked) {
  history.replaceState(null, "", location.pathname);
  one("[name=email]", linked).value = link.get("email") ?? "";
  if (!link.get("token") || !link.get("email")) refuse("incomplete");
  else if (page === "change") showFormerEmail();
}
if (document.body.dataset.confirm === "on") one("#register-secret").remove();
for (const anchor of all("a[data-keep]")) anchor.search = location.search;
document.title = one(`#${page} h1`).textContent;
if (page === "account") showAccount();
if (page === "login") hasSession().then((found) => found && enter(nextAddress()));
if (page === "login" && hasPasskeys) {
  offerInField();
  // A question that is still open would keep the next page from asking (iOS).
  addEventListener("pagehide", () => asked.controller?.abort());
  addEventListener("pageshow", (event) => event.persisted && offerInField());
}
// A link opened in a tab that already shows this page changes only the fragment.
addEventListener("hashchange", () => location.reload());
