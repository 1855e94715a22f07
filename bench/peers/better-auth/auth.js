// Better Auth by its installation page, with email and password; BETTER_AUTH_URL is in the environment.
import { betterAuth } from "better-auth";
import Database from "better-sqlite3";

export const auth = betterAuth({
  database: new Database("./bench.db"),
  emailAndPassword: { enabled: true },
  // Fixed, for both workers need the same.
  secret: "the benchmark's, and no secret, but long enough",
  // By default it is on in production and lets one address ask a hundred times in ten seconds: no benchmark gets past.
  rateLimit: { enabled: false },
});
