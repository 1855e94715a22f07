// Its handler on Node's own server, as its documentation mounts it, in two processes: node app.js PORT
import cluster from "node:cluster";
import { createServer } from "node:http";

if (cluster.isPrimary) {
  // When this one ends, the workers notice and end too.
  for (let worker = 0; worker < 2; worker += 1) cluster.fork();
} else {
  const { toNodeHandler } = await import("better-auth/node");
  const { auth } = await import("./auth.js");
  createServer(toNodeHandler(auth)).listen(Number(process.argv[2]), "127.0.0.1");
}
