// The pages' only script: each form sends what it has to the service's own routes and shows the answer.
"use strict";

const page = document.body.dataset.page;
const one = (selector, parent = document) => parent.querySelector(selector);
const all = (selector, parent = document) => [...parent.querySelectorAll(selector)];
const text = (name) => one("#texts").content.querySelector(`[data-text="${CSS.escape(name)}"]`)?.textContent;

// An answer is {status, …what the service said}; status 0 when it cannot be reached.
async function ask(method, path, fields) {
  try {
    const body = fields && new URLSearchParams(fields);
    // manual: a browser would follow the logout's 302 with another DELETE.
    const answer = await fetch(path, {method, body, redirect: "manual", cache: "no-store"});
    const said = answer.type === "opaqueredirect" ? {} : await answer.json();
    return {...said, status: answer.type === "opaqueredirect" ? 302 : answer.status};
  } catch {
    return {status: 0, message: text("unreachable")};
  }
}

function say(form, message, wrong = false) {
  const status = one(".status", form);
  status.textContent = message;
  status.classList.toggle("error", wrong);
}

// Where to go after signing in: what was asked for on this host, or on one that shares the cookie; else the account.
function destination() {
  try {
    const [, given] = location.search.split(/[?&]return=/);
    // nginx cannot encode it: then it is all the rest, with its own & and =.
    const wanted = new URL(given.includes("://") ? given : decodeURIComponent(given));
    const domain = document.body.dataset.domain;
    const shared = domain && (wanted.hostname === domain || wanted.hostname.endsWith(`.${domain}`));
    const ours = wanted.origin === location.origin || shared;
    return ours && wanted.protocol === location.protocol && !wanted.username && !wanted.password ? wanted.href : "/account";
  } catch {
    return "/account";
  }
}

// Each action takes the fields of its form and returns what to say; what it throws is said as an error.
const actions = {
  async login(fields, form) {
    const answer = await ask("POST", "/sessions", fields);
    if (answer.message === "one-time code required") {
      one("#login-code").hidden = false;
      one("#login-otp").required = true;
      one("#login-otp").focus();
    }
    refuse(answer);
    await enter();
  },

  async register(fields, form) {
    refuse(await ask("POST", "/users", fields));
    say(form, text("registered"));
    refuse(await ask("POST", "/sessions", fields));
    await enter();
  },

  async forgot(fields) {
    const answer = refuse(await ask("POST", "/reset_password", fields));
    if (answer.reset_token) { // a development service, which mails nothing
      location.assign(`/reset#${new URLSearchParams({token: answer.reset_token, email: answer.email})}`);
    }
    return text("mailed");
  },

  async reset(fields, form) {
    refuse(await ask("PUT", "/reset_password", {...fields, reset_token: link.get("token")}));
    one("button", form).hidden = true;
    one("a", form.parentElement).href = "/login";
    one("a", form.parentElement).textContent = one("#login h1").textContent;
    return text("set");
  },

  async logout() {
    refuse(await ask("DELETE", "/sessions"));
    location.assign("/login");
  },

  async others() {
    refuse(await ask("DELETE", "/sessions/others"));
    await showAccount();
    return text("ended");
  },

  async password(fields) {
    refuse(await ask("PUT", "/password", fields));
    await showAccount();
    return text("changed");
  },

  async begin(fields) {
    const {secret, uri, qr} = refuse(await ask("POST", "/totp", fields));
    showFactor("pending");
    one("#factor-key").textContent = secret.match(/.{1,4}/g).join(" ");
    one("#factor-link").href = uri;
    one("#factor-picture").hidden = !qr;
    if (qr) one("#factor-picture").src = qr;
    one("#confirm-otp").focus();
  },

  async confirm(fields) {
    const answer = refuse(await ask("PUT", "/totp", fields));
    one("#codes").replaceChildren(...answer.recovery_codes.map((code) => item(element("code", code))));
    one("#recovery").hidden = false;
    showFactor("on");
    await showAccount();
  },

  async off(fields) {
    refuse(await ask("DELETE", "/totp", fields));
    one("#recovery").hidden = true;
    showFactor("off");
    await showAccount();
    say(one("[data-action=begin]"), text("factor-off"));
  },

  async delete(fields) {
    refuse(await ask("DELETE", "/profile", fields));
    document.body.dataset.page = "login";
    say(one("[data-action=login]"), text("deleted"));
  },
};

function refuse(answer) {
  if (answer.status >= 200 && answer.status < 400) return answer;
  throw new Error(text(`:${answer.message}`) ?? answer.message);
}

function element(name, content) {
  const made = document.createElement(name);
  made.textContent = content;
  return made;
}

function item(...parts) {
  const made = document.createElement("li");
  made.append(...parts);
  return made;
}

function showFactor(state) {
  for (const form of all("[data-factor]")) form.hidden = form.dataset.factor !== state;
}

async function showAccount() {
  const {status, message, email = "", second_factor: factor = false, sessions = []} = await ask("GET", "/sessions");
  if (message === "not logged in") return location.reload(); // the service leads to the sign-in page
  one("#onward").hidden = !location.search || status !== 200;
  one("#onward a").href = destination();
  one("#who").textContent = status === 200 ? email : text(`:${message}`) ?? message;
  for (const field of all(".aside")) field.value = email;
  showFactor(factor ? "on" : "off");
  one("#sessions").replaceChildren(...sessions.map((session) => {
    const seen = `${text("seen")} ${new Date(session.last_seen).toLocaleString()}`;
    const about = element("small", `${session.user_agent} · ${seen}`);
    if (session.current) return item(element("strong", `${session.address}, ${text("this")}`), about);
    const end = element("button", text("end"));
    end.setAttribute("aria-label", `${text("end")} ${session.address}, ${seen}`);
    end.addEventListener("click", async () => {
      await ask("DELETE", `/sessions/${session.id}`);
      await showAccount();
    });
    return item(element("span", `${session.address} `), end, about);
  }));
}

// A 302 is no error in the browser's console, as a 401 is.
const isIn = async () => (await ask("GET", "/verify?login=1")).status === 200;

// Who comes back from there at once would go to and fro for ever: a cookie that only the application gets, beside the
// session's, makes two, and two are none.
function onward() {
  const [last, at] = (sessionStorage.getItem("onward") ?? "").split(" ");
  sessionStorage.setItem("onward", `${location.search} ${Date.now()}`);
  return last === location.search && Date.now() - at < 10_000 ? `/account${location.search}` : destination();
}

// Who must set up a second factor first goes there: an application would send them back here, and so on for ever.
async function enter() {
  location.assign(await isIn() ? destination() : `/account${location.search}`);
}

for (const form of all("form")) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = one("button", form);
    if (button.disabled) return;
    button.disabled = true;
    say(form, text("working"));
    try {
      say(form, (await actions[form.dataset.action](Object.fromEntries(new FormData(form)), form)) ?? "");
      for (const field of all("[type=password], [name=otp]", form)) field.value = "";
    } catch (error) {
      say(form, error.message, true);
    }
    button.disabled = false;
  });
}

// The token leaves the address bar, and with it the history, before anything else is done.
const link = new URLSearchParams(page === "reset" ? location.hash.slice(1) : "");
if (page === "reset") {
  history.replaceState(null, "", location.pathname);
  one("#reset-email").value = link.get("email") ?? "";
  if (!link.get("token") || !link.get("email")) {
    say(one("[data-action=reset]"), text("incomplete"), true);
    one("[data-action=reset] button").disabled = true;
  }
}
for (const anchor of all("a[data-keep]")) anchor.search = location.search;
document.title = one(`#${page} h1`).textContent;
if (page === "account") showAccount();
if (page === "login") isIn().then((already) => already && location.replace(onward()));
// A link that is opened in a tab which shows this page already.
addEventListener("hashchange", () => location.reload());
