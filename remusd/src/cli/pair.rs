//! `remus pair`, `unpair`, `peers` and `keys`.

use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};
use tokio::io::BufReader;
use tokio::process::{Child, ChildStdin, ChildStdout, Command as Process};

use crate::api::{ApiError, ErrorCode};
use crate::pair::exchange::{Other, REMOTE_COMMAND, own_offer};
use crate::pair::socket::{self, ask};
use crate::pair::{Fingerprint, PairingRequest, peer::is_host};

/// Options of `remus pair`.
#[derive(Debug, clap::Args)]
pub struct Pair {
    /// Host as ssh takes it: HOST or USER@HOST (root there).
    pub host: String,
    /// The other host's fingerprint (there: `remus keys show`): pairs without asking, and only if it is this one.
    #[arg(long, value_name = "FINGERPRINT")]
    pub yes: Option<Fingerprint>,
    /// Command used instead of ssh.
    #[arg(short = 's', long)]
    pub ssh: Option<String>,
    /// Address at which this host reaches the other [default: HOST].
    #[arg(long)]
    pub address: Option<String>,
    /// Address at which the other host reaches this one [default: the one from which ssh came].
    #[arg(long)]
    pub own_address: Option<String>,
    /// What the other host is to call this one [default: its host name].
    #[arg(long)]
    pub own_name: Option<String>,
}

/// What `remus keys` does.
#[derive(Clone, Copy, Debug, clap::Subcommand)]
pub enum Keys {
    /// Show this host's fingerprint. Makes its keys if it has none yet.
    Show,
    /// Change this host's key pair: peers are told the new one, accept both for a while, and then only the new one.
    Rotate {
        /// Also if not every peer can be told; those must be paired again.
        #[arg(long)]
        force: bool,
    },
}

fn wrong(text: String) -> ApiError {
    ApiError::new(ErrorCode::Invalid, text)
}

/// Pairs with a host. `control` is the control socket; the answer has a `message` for people.
pub(super) async fn pair(control: &Path, pair: &Pair, json: bool) -> Result<Value, ApiError> {
    let socket = socket::beside(control);
    let name = pair.host.rsplit_once('@').map_or(pair.host.as_str(), |(_, host)| host);
    let address = pair.address.as_deref().unwrap_or(name);
    for text in [Some(name), Some(address), pair.own_address.as_deref(), pair.own_name.as_deref()].into_iter().flatten()
    {
        if !is_host(text) {
            return Err(wrong(format!("{text:?} is not a host name or address")));
        }
    }
    if pair.host.starts_with('-') {
        return Err(wrong(format!("{:?} is not a host", pair.host)));
    }
    let mut ours = own_offer(&socket).await?;
    if let Some(own_name) = &pair.own_name {
        ours.name.clone_from(own_name);
    }
    // Without somebody at a terminal nobody can answer a password prompt.
    let asks = !json && std::io::stdin().is_terminal();
    let (_ssh, writer, reader) = start_ssh(pair, asks)?;
    let mut other = Other { name: name.to_owned(), reader: BufReader::new(reader), writer };
    let theirs = other.offer().await?;
    let (own, found) = (ours.certificate.fingerprint(), theirs.certificate.fingerprint());
    match pair.yes {
        Some(expected) if expected != found => {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!(
                    "{name} shows {found}, not {expected}: it is another host, or somebody is in between. Nothing was pinned"
                ),
            ));
        }
        Some(_) => {}
        None if !asks => {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!(
                    "{name} shows {found}; this host is {own}. Nothing was pinned. Compare it with `remus keys show` there, then: remus pair \
                     {} --yes {found}",
                    pair.host
                ),
            ));
        }
        None => {
            println!("this host   {own}\n{name:<11} {found}");
            println!(
                "`remus keys show` on each host tells its own. Whoever has these keys may keep copies of guests here and read them."
            );
            if !confirmed()? {
                return Err(ApiError::new(ErrorCode::Conflict, "Not paired; nothing was pinned"));
            }
        }
    }
    other.pin(ours, pair.own_address.clone()).await?;
    let pin = PairingRequest::Pin { offer: theirs, name: name.to_owned(), address: address.to_owned() };
    ask(&socket, &pin).await.map_err(|error| {
        let text =
            format!("{} (the other host has pinned this one already; `remus unpair` there undoes that)", error.message);
        ApiError::new(error.code, text)
    })?;
    let there = ask(&socket, &PairingRequest::Check { host: name.to_owned() }).await.err().map(|e| e.message);
    let back = other.check().await?;
    let mut message = format!("Paired with {name}.");
    let mut tell = |way: &str, why_not: &Option<String>| match why_not {
        None => message += &format!("\n{way}: TLS works."),
        Some(text) => message += &format!("\n{way}: NOT reached by TLS: {text}"),
    };
    tell(&format!("from here to {name}"), &there);
    tell(&format!("from {name} to here"), &back);
    Ok(json!({
        "message": message,
        "name": name,
        "fingerprint": found,
        "own-fingerprint": own,
        "reached": there.is_none(),
        "reached-back": back.is_none(),
    }))
}

fn start_ssh(pair: &Pair, asks: bool) -> Result<(Child, ChildStdin, ChildStdout), ApiError> {
    let ssh = pair.ssh.as_deref().unwrap_or(match asks {
        true => "ssh -o ConnectTimeout=10",
        false => crate::link::transport::DEFAULT_SSH,
    });
    let failed = |text: String| ApiError::new(ErrorCode::Peer, format!("cannot start `{ssh}`: {text}"));
    // The host is an argument of the shell, not part of its program.
    let mut child = Process::new("sh")
        .args(["-c", &format!("exec {ssh} \"$1\" {REMOTE_COMMAND}"), "sh", &pair.host])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    match (child.stdin.take(), child.stdout.take()) {
        (Some(stdin), Some(stdout)) => Ok((child, stdin, stdout)),
        _ => Err(failed("no pipes".into())),
    }
}

/// Asks at the terminal.
fn confirmed() -> Result<bool, ApiError> {
    let failed = |error: std::io::Error| ApiError::new(ErrorCode::Failed, error.to_string());
    print!("Pair them? (yes/no) ");
    std::io::stdout().flush().map_err(failed)?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).map_err(failed)?;
    Ok(line.trim() == "yes")
}

/// Forgets a host.
pub(super) async fn unpair(control: &Path, host: &str) -> Result<Value, ApiError> {
    ask(&socket::beside(control), &PairingRequest::Unpair { host: host.into() }).await
}

/// Lists peers.
pub(super) async fn peers(control: &Path) -> Result<Value, ApiError> {
    let mut value = ask(&socket::beside(control), &PairingRequest::Peers).await?;
    let text = table(&value);
    value["message"] = text.into();
    Ok(value)
}

/// Shows or changes keys.
pub(super) async fn keys(control: &Path, keys: Keys) -> Result<Value, ApiError> {
    let socket = socket::beside(control);
    match keys {
        Keys::Show => {
            let fingerprint = own_offer(&socket).await?.certificate.fingerprint();
            Ok(json!({ "message": fingerprint.to_string(), "fingerprint": fingerprint }))
        }
        Keys::Rotate { force } => ask(&socket, &PairingRequest::RotateKeys { force }).await,
    }
}

fn table(value: &Value) -> String {
    let word = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    };
    let mut out = match value["fingerprint"].as_str() {
        Some(fingerprint) => format!("this host: {fingerprint}, until {}", word(&value["expires"])),
        None => "this host has no keys yet; `remus pair HOST` makes them".into(),
    };
    if let Some(next) = value["next-fingerprint"].as_str() {
        out += &format!("\nnext key:  {next}, in use once every peer knows it: `remus keys rotate`");
    }
    out += &format!("\nlistening: {}", word(&value["listening"]));
    for peer in value["peers"].as_array().into_iter().flatten() {
        out += &format!(
            "\n{}  {} port {}  paired {}  {} sessions",
            word(&peer["name"]),
            word(&peer["address"]),
            peer["port"],
            word(&peer["paired"]),
            peer["sessions"]
        );
        for fingerprint in peer["fingerprints"].as_array().into_iter().flatten() {
            out += &format!("\n  {}", word(fingerprint));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_listed_with_every_accepted_key() {
        let text = table(&json!({
            "fingerprint": "SHA256:own", "expires": "2036-01-01", "next-fingerprint": null, "listening": "[::]:7368",
            "peers": [{ "name": "hostb", "address": "10.0.0.2", "port": 7368, "paired": "2026-11-21", "sessions": 2,
                        "fingerprints": ["SHA256:old", "SHA256:new"] }],
        }));
        for part in
            ["SHA256:own, until 2036", "hostb  10.0.0.2 port 7368", "2 sessions", "\n  SHA256:old\n  SHA256:new"]
        {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("next key"));
        assert!(table(&json!({ "fingerprint": null, "listening": "off", "peers": [] })).contains("no keys yet"));
    }

    #[tokio::test]
    async fn a_host_cannot_be_an_option_or_a_command() {
        for host in ["-oProxyCommand=x", "a;reboot", "root@", "$(x)"] {
            let pair_args =
                Pair { host: host.into(), yes: None, ssh: None, address: None, own_address: None, own_name: None };
            let error = pair(Path::new("/nonexistent/s"), &pair_args, true).await.unwrap_err();
            assert_eq!(error.code, ErrorCode::Invalid, "{host}: {error}");
        }
    }
}
