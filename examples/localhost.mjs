// An application on your own machine that asks authsvc itself, without a proxy, for development. Run these two commands in
// the checkout, each in a terminal of its own, and open http://localhost:3000/ in a browser:
//
//     make run                       # authsvc, on port 5000
//     node examples/localhost.mjs    # this application, on port 3000
//
// Browsers send a cookie to every port of its host. Use localhost in every address that a browser opens, and not 127.0.0.1:
// the cookie of one is not sent to the other. In production a proxy asks authsvc, as in deploy/nginx.conf.

import http from "node:http";

const PORT = 3000;

// Returns the email of the user who sent a request, or null if nobody is signed in.
async function userOf(request) {
  const answer = await fetch("http://127.0.0.1:5000/verify", {headers: {cookie: request.headers.cookie ?? ""}});
  if (answer.status === 401) return null;
  if (!answer.ok) throw new Error(`authsvc answers ${answer.status}`);
  return decodeURIComponent(answer.headers.get("remote-user"));
}

async function answer(request, response) {
  const user = await userOf(request);
  if (user === null) {
    const here = encodeURIComponent(`http://localhost:${PORT}${request.url}`);
    response.writeHead(302, {location: `http://localhost:5000/login?return=${here}`}).end();
  } else {
    response.writeHead(200, {"content-type": "text/plain; charset=utf-8"}).end(`Hello ${user}\n`);
  }
}

http.createServer((request, response) => {
  answer(request, response).catch((error) => response.writeHead(502).end(`${error.message}\n`));
}).listen(PORT, "127.0.0.1");
