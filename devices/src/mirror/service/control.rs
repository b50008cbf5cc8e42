//! The control socket: one JSON request per line, one JSON answer per line.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::node::{Node, NodeError};

/// What may be asked. A field that a request does not have is refused, not ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case", deny_unknown_fields)]
#[allow(missing_docs)] // As the methods of `Node` that they name.
pub enum Request {
    Status {},
    Promote {
        #[serde(default)]
        force: bool,
    },
    Demote {},
    Open {},
    Close {},
    Attach {
        #[serde(default)]
        index: Option<u32>,
    },
    Detach {},
    Connect {
        #[serde(default)]
        via: Option<String>,
    },
    Disconnect {},
    Arm {},
    Disarm {},
    Barrier {
        epoch: u64,
    },
    Held {
        epoch: u64,
        #[serde(default)]
        wait_ms: u64,
    },
    Commit {
        epoch: u64,
    },
    Freeze {},
    Activate {
        epoch: u64,
    },
    Leave {},
    /// Ends the service of a disk that was left.
    Quit {},
    Verify {},
    AbortVerify {},
    /// From now on only events are sent, one per line.
    Events {},
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// What was asked for; null when there is nothing to say.
    Ok(serde_json::Value),
    /// Why not.
    Error(String),
}

/// How a disk is. Sizes in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// `none`, `source` or `target`.
    pub role: String,
    /// Of the disk.
    pub size: u64,
    /// Of a block.
    pub block: u32,
    /// Clients are served.
    pub open: bool,
    /// The N of its `/dev/nbdN`, while it is attached.
    pub nbd: Option<u32>,
    /// The link to its block device.
    pub link: PathBuf,
    /// Source: how the copy is reached; without it nobody is looking for one.
    pub via: Option<String>,
    /// Source: there is a session.
    pub connected: bool,
    /// Source: the copies are alike.
    pub in_sync: bool,
    /// Source: accepted and not yet applied by the copy.
    pub outstanding: u64,
    /// Source: of that, not sent yet.
    pub unsent: u64,
    /// Source: per second, how fast the copy applies.
    pub rate: u64,
    /// Source: writes that are held back now.
    pub throttled: usize,
    /// Source: regions that are not on the copy's stable storage.
    pub dirty: u64,
    /// Source: regions that would have to be compared after a crash now.
    pub marked: u64,
    /// Source: to be synchronised.
    pub sync_left: u64,
    /// Source: was to be synchronised when the session began.
    pub sync_total: u64,
    /// Source: was sent because it differed.
    pub sync_copied: u64,
    /// Source: where a read error keeps synchronisation from going on.
    pub sync_stuck: Option<u64>,
    /// Source: compared and found different by the running verify job.
    pub verified: Option<(u64, u64)>,
    /// Target: on disk, the copy is known to be good.
    pub good: bool,
    /// Target: the session, or the last one.
    pub target: Option<TargetStatus>,
}

/// How a target's session is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TargetStatus {
    /// The source is there.
    pub connected: bool,
    /// Batches wait for their epoch's commit.
    pub armed: bool,
    /// The copies were alike when last heard of.
    pub synced: bool,
    /// Bytes, in memory and in the journal.
    pub held: u64,
    /// Of them, bytes in memory.
    pub in_memory: u64,
    /// Bytes of the journal that are in use.
    pub in_journal: u64,
    /// Batches.
    pub received: u64,
    /// Batches.
    pub applied: u64,
    /// Batches.
    pub durable: u64,
    /// The newest that is whole here.
    pub newest_epoch: Option<u64>,
}

impl Node {
    fn answer(self: &Arc<Self>, request: Request) -> Response {
        fn ok<T: Serialize>(result: Result<T, NodeError>) -> Response {
            match result {
                Ok(value) => serde_json::to_value(value).map_or_else(|e| Response::Error(e.to_string()), Response::Ok),
                Err(error) => Response::Error(error.to_string()),
            }
        }
        match request {
            Request::Status {} => ok(Ok(self.status())),
            Request::Promote { force } => ok(self.promote(force)),
            Request::Demote {} => ok(self.demote()),
            Request::Open {} => ok(self.set_open()),
            Request::Close {} => ok(self.close()),
            Request::Attach { index } => ok(self.attach(index)),
            Request::Detach {} => ok(self.detach()),
            Request::Connect { via } => ok(self.connect(via.as_deref())),
            Request::Disconnect {} => ok(self.disconnect()),
            Request::Arm {} => ok(self.arm()),
            Request::Disarm {} => ok(self.disarm()),
            Request::Barrier { epoch } => ok(self.barrier(epoch)),
            Request::Held { epoch, wait_ms } => ok(self.held(epoch, Duration::from_millis(wait_ms))),
            Request::Commit { epoch } => ok(self.commit(epoch)),
            Request::Freeze {} => ok(self.freeze()),
            Request::Activate { epoch } => ok(self.activate(epoch)),
            Request::Leave {} => ok(self.leave()),
            Request::Quit {} => ok(self.may_quit()),
            Request::Verify {} => ok(self.verify()),
            Request::AbortVerify {} => ok(self.abort_verify()),
            Request::Events {} => Response::Ok(serde_json::Value::Null),
        }
    }

    fn converse(self: &Arc<Self>, stream: &UnixStream) -> io::Result<()> {
        let mut to = stream;
        let mut say = |value: serde_json::Result<Vec<u8>>| {
            let mut line = value?;
            line.push(b'\n');
            to.write_all(&line)
        };
        for line in BufReader::new(stream).lines() {
            let request = match serde_json::from_str(&line?) {
                Ok(request) => request,
                Err(error) => {
                    say(serde_json::to_vec(&Response::Error(format!("the request is not understood: {error}"))))?;
                    continue;
                }
            };
            let events = (request == Request::Events {}).then(|| self.events());
            let quits = request == Request::Quit {};
            let answer = self.answer(request);
            say(serde_json::to_vec(&answer))?;
            if quits && matches!(answer, Response::Ok(_)) {
                std::process::exit(0);
            }
            for event in events.into_iter().flatten() {
                say(serde_json::to_vec(&event))?;
            }
        }
        Ok(())
    }
}

/// Serves the disk's control, peer and NBD sockets in `run`. Blocks for ever.
///
/// # Errors
/// When a socket cannot be made or fails.
pub fn serve_control(node: &Arc<Node>, run: &Path, name: &str) -> io::Result<()> {
    let socket = |kind: &str| super::node::listen(&run.join(format!("{name}.{kind}")));
    let (control, peers, clients): (UnixListener, _, _) = (socket("ctl")?, socket("peer")?, socket("nbd")?);
    // A service without one of its sockets is of no use: it ends, and is started again.
    let fatal = |what: &'static str, result: io::Result<()>| {
        tracing::error!(what, error = ?result.err(), "a socket has failed");
        std::process::exit(1);
    };
    let other = node.clone();
    std::thread::Builder::new().name("peers".into()).spawn(move || fatal("peer", other.serve_peers(&peers)))?;
    let other = node.clone();
    std::thread::Builder::new().name("clients".into()).spawn(move || fatal("nbd", other.serve_nbd(&clients)))?;
    loop {
        let (stream, _) = control.accept()?;
        let node = node.clone();
        std::thread::Builder::new().name("control".into()).spawn(move || drop(node.converse(&stream)))?;
    }
}

/// Asks a running service. Blocks until it has answered.
///
/// # Errors
/// When it does not run or does not answer.
pub fn call(socket: &Path, request: &Request) -> io::Result<Response> {
    let mut stream = UnixStream::connect(socket)?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(serde_json::from_str(&answer)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_and_commands_are_refused() {
        let parse = |text: &str| serde_json::from_str::<Request>(text);
        assert_eq!(parse(r#"{"cmd":"status"}"#).unwrap(), Request::Status {});
        assert_eq!(parse(r#"{"cmd":"promote"}"#).unwrap(), Request::Promote { force: false });
        assert_eq!(parse(r#"{"cmd":"barrier","epoch":3}"#).unwrap(), Request::Barrier { epoch: 3 });
        for wrong in [r#"{"cmd":"status","force":true}"#, r#"{"cmd":"commit"}"#, r#"{"cmd":"comit","epoch":1}"#] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
