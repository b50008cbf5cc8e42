//! The stock `libxl-save-helper` as capture engine.
//!
//! The helper is a process of its own: a crash or `assert` in libxenguest ends a capture, not remusd. Its stream goes into a
//! pipe that a dedicated thread drains; its calls come on stdout and are answered on stdin (see [`super::ipc`]).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use async_trait::async_trait;
use bytes::BytesMut;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::oneshot;

use super::buffer::Shared;
use super::engine::{Engine, EngineCall};
use super::ipc;
use super::{CaptureBudget, CaptureError, CaptureStats, ItemReceiver, drain};
use crate::ids::DomId;

/// Capacity asked for the stream's pipe, bytes: the most an unprivileged process may have, so always granted.
const PIPE: i32 = 1 << 20;
/// `XCFLAGS_LIVE` and `XC_STREAM_REMUS` of xenguest.h.
const LIVE: &str = "1";
const STREAM_REMUS: &str = "1";

/// What to capture, and with what.
#[derive(Clone, Debug)]
pub struct SaveHelperConfig {
    /// The domain.
    pub domid: DomId,
    /// The helper; by default the one of the running Xen version, or what the environment's `LIBXL_SAVE_HELPER` names.
    pub helper: Option<PathBuf>,
    /// How much may be held in memory.
    pub budget: CaptureBudget,
}

impl SaveHelperConfig {
    /// The defaults for a domain.
    #[must_use]
    pub fn new(domid: DomId) -> Self {
        Self { domid, helper: None, budget: CaptureBudget::default() }
    }
}

/// A running capture. Dropping it kills the helper; see [`kill`](Engine::kill) for what that leaves.
pub struct SaveHelper {
    domid: DomId,
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
    incoming: BytesMut,
    awaits_reply: bool,
    fault_told: bool,
    shared: Arc<Shared>,
    /// Closed when this is dropped: the drain thread may end then, and with it the helper.
    _release: Sender<()>,
}

impl SaveHelper {
    /// Starts the helper. It begins to copy the running guest at once.
    ///
    /// # Errors
    /// [`CaptureError::NoHelper`], [`CaptureError::Spawn`], [`CaptureError::Version`].
    pub async fn spawn(cfg: SaveHelperConfig) -> Result<(Self, ItemReceiver), CaptureError> {
        let domid = cfg.domid;
        let path = helper_path(cfg.helper.as_deref())?;
        let fail = |cause: String| CaptureError::Spawn { path: path.clone(), domid, cause };
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).map_err(|errno| fail(errno.to_string()))?;
        // A smaller pipe only makes it slower.
        if let Err(errno) = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(PIPE)) {
            tracing::warn!(%domid, "the capture pipe stays small: {errno}");
        }
        let shared = Shared::new(domid, cfg.budget);
        let command = command(&path, domid, &writer);
        let (child_tx, child_rx) = oneshot::channel();
        let (release, released) = channel();
        let runtime = tokio::runtime::Handle::current();
        let inner = Arc::clone(&shared);
        // The drain thread also spawns the child, as its end is what ends an orphaned child.
        std::thread::Builder::new()
            .name(format!("drain-{domid}"))
            .spawn(move || {
                let spawned = spawn_here(&runtime, command, writer);
                let ok = spawned.is_ok();
                if child_tx.send(spawned).is_ok() && ok {
                    drain::drain(domid, reader.into(), &inner, &released);
                }
            })
            .map_err(|error| fail(error.to_string()))?;
        let mut child = child_rx
            .await
            .map_err(|_| fail("the drain thread died".into()))?
            .map_err(|error| fail(error.to_string()))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(fail("its pipes are missing".into()));
        };
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(async move {
                let mut lines = BufReader::new(stderr).lines();
                while let Ok(Some(line)) = lines.next_line().await {
                    tracing::warn!(%domid, "libxl-save-helper: {line}");
                }
            });
        }
        let receiver = ItemReceiver::new(Arc::clone(&shared));
        Ok((
            Self {
                domid,
                child,
                stdin,
                stdout,
                incoming: BytesMut::with_capacity(4096),
                awaits_reply: false,
                fault_told: false,
                _release: release,
                shared,
            },
            receiver,
        ))
    }

    fn io(&self, doing: &'static str, error: &io::Error) -> CaptureError {
        CaptureError::Io { domid: self.domid, doing, cause: error.to_string() }
    }
}

#[async_trait]
impl Engine for SaveHelper {
    async fn next_call(&mut self) -> Result<EngineCall, CaptureError> {
        loop {
            match ipc::decode(&mut self.incoming) {
                Ok(Some(call)) => {
                    self.awaits_reply = call.wants_reply();
                    return Ok(call);
                }
                Ok(None) => {}
                Err(cause) => {
                    return Err(CaptureError::Protocol { domid: self.domid, cause });
                }
            }
            let read = tokio::select! {
                biased;
                read = self.stdout.read_buf(&mut self.incoming) => read,
                error = self.shared.failed(), if !self.fault_told => {
                    self.fault_told = true;
                    return Err(error);
                }
            };
            let read = read.map_err(|error| self.io("waiting for its calls", &error))?;
            if read == 0 {
                let status = self.child.wait().await;
                let status = status.map_err(|error| self.io("waiting for its end", &error))?;
                return Ok(EngineCall::Exited(exit(status)));
            }
        }
    }

    async fn reply(&mut self, value: i32) -> Result<(), CaptureError> {
        if !self.awaits_reply {
            return Err(CaptureError::Protocol { domid: self.domid, cause: format!("reply {value} to nothing") });
        }
        self.awaits_reply = false;
        let written = self.stdin.write_all(&value.to_ne_bytes()).await;
        written.map_err(|error| self.io("answering it", &error))
    }

    fn set_hard_mode(&self, on: bool) {
        self.shared.set_hard_mode(on);
    }

    fn discard(&self) {
        self.shared.discard();
    }

    fn stats(&self) -> CaptureStats {
        self.shared.stats()
    }

    /// Its next write fails. Not by SIGTERM, as libxl does it: one that hits the helper while it waits for a reply ends it at once,
    /// with log-dirty on.
    fn stop_gently(&self) {
        self.shared.close();
    }

    async fn kill(mut self: Box<Self>) {
        self.shared.close();
        let _ = self.child.kill().await;
    }

    fn pid(&self) -> Option<u32> {
        self.child.id()
    }
}

impl Drop for SaveHelper {
    fn drop(&mut self) {
        self.shared.close();
        // An id is there until the child was reaped, so this cannot hit another process. Reaping is the runtime's.
        if let Some(pid) = self.child.id().and_then(|id| i32::try_from(id).ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Empty for a good end.
fn exit(status: std::process::ExitStatus) -> String {
    if status.success() { String::new() } else { status.to_string() }
}

fn command(path: &Path, domid: DomId, stream: &OwnedFd) -> std::process::Command {
    let mut command = std::process::Command::new(path);
    command
        .arg("--save-domain")
        .arg(stream.as_raw_fd().to_string())
        .arg("-1")
        .arg(domid.to_string())
        .arg(LIVE)
        .arg(ipc::CALLBACK_FLAGS.to_string())
        .arg(STREAM_REMUS)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    crate::xen::spawn::isolate(&mut command, stream.as_fd());
    command
}

/// Spawns on this thread; our end of the stream's writer is closed before this returns.
fn spawn_here(runtime: &tokio::runtime::Handle, command: std::process::Command, writer: OwnedFd) -> io::Result<Child> {
    let _context = runtime.enter();
    let child = Command::from(command).spawn();
    drop(writer);
    child
}

fn helper_path(configured: Option<&Path>) -> Result<PathBuf, CaptureError> {
    let path = match configured {
        Some(path) => path.to_owned(),
        None => match std::env::var_os("LIBXL_SAVE_HELPER") {
            Some(path) => path.into(),
            None => packaged_helper()?,
        },
    };
    if path.is_file() { Ok(path) } else { Err(CaptureError::NoHelper { path }) }
}

/// Where Debian's xen-utils packages put it: by version, as several may be installed.
fn packaged_helper() -> Result<PathBuf, CaptureError> {
    let part = |name: &str| {
        std::fs::read_to_string(format!("/sys/hypervisor/version/{name}"))
            .map(|text| text.trim().to_owned())
            .map_err(|error| CaptureError::Version { cause: error.to_string() })
    };
    let (major, minor) = (part("major")?, part("minor")?);
    Ok(format!("/usr/lib/xen-{major}.{minor}/bin/libxl-save-helper").into())
}
