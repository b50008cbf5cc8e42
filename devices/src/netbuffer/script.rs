//! A set-up script in place of our own intermediate devices, as `xl remus -N SCRIPT` has it.
//!
//! The contract is that of Xen's `tools/hotplug/Linux/remus-netbuf-setup` and `libxl_netbuffer.c`: the script is run
//! as `SCRIPT setup` and `SCRIPT teardown` with `vifname` and `XENBUS_PATH=/libxl/DOMID/remus/netbuf/DEVID` in its
//! environment, for `teardown` also `REMUS_IFB`. It picks an intermediate device, redirects the interface there,
//! and writes the device's name to `XENBUS_PATH/ifb`; what keeps it from that goes to `XENBUS_PATH/hotplug-error`.
//!
//! What it leaves out is added by us, so that the promise is the same with every script: a queue that is open until
//! the first armed epoch, and from then on a redirect of every protocol (the stock script redirects IPv4 alone).

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::Command;

use crate::device::Ending;
use crate::error::BoxError;

use super::conn::Conn;
use super::error::NetError;
use super::ops::On;
use super::takedown::{IfbFate, take_down};

/// How long the script may take, as libxl's `LIBXL_HOTPLUG_TIMEOUT`.
const PATIENCE: Duration = Duration::from_secs(40);

/// How long held output may take to leave when a recovery releases it.
const DRAIN: Duration = Duration::from_secs(2);

/// Where a script leaves its answer: xenstore.
#[async_trait]
pub trait SetupStore: Send + Sync {
    /// A node's value; `None` if it does not exist.
    ///
    /// # Errors
    /// When the store cannot be read.
    async fn read(&self, path: &str) -> Result<Option<String>, BoxError>;
}

/// A set-up script and where it answers.
#[derive(Clone)]
pub struct SetupScript {
    path: PathBuf,
    store: Arc<dyn SetupStore>,
}

/// The nic that a script is run for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nic<'a> {
    pub domid: u32,
    pub devid: u32,
    pub vif: &'a str,
}

impl Nic<'_> {
    fn directory(&self) -> String {
        format!("/libxl/{}/remus/netbuf/{}", self.domid, self.devid)
    }
}

impl SetupScript {
    /// The script at `path`. Nothing is run yet.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, store: Arc<dyn SetupStore>) -> Self {
        Self { path: path.into(), store }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Has the script set the nic up. Returns the intermediate device that it chose.
    pub(super) async fn setup(&self, nic: Nic<'_>) -> Result<String, NetError> {
        let ran = self.run("setup", nic, None).await;
        // libxl asks for the device first: a script may have failed after it had taken one.
        let ifb = self.read(&format!("{}/ifb", nic.directory())).await?;
        let said = match ran {
            Ok(()) => match ifb {
                Some(ifb) => return Ok(ifb),
                None => format!("it named no device in {}/ifb", nic.directory()),
            },
            Err(said) => said,
        };
        let why = self.read(&format!("{}/hotplug-error", nic.directory())).await?.unwrap_or(said);
        if ifb.is_some() {
            // It gives its device back; the failure to tell of is the one above.
            if let Err(error) = self.teardown(nic).await {
                tracing::warn!(%error, "after a failed set-up");
            }
        }
        Err(self.failed("setup", nic, why))
    }

    /// Has the script undo its set-up. Fine if there was none.
    pub(super) async fn teardown(&self, nic: Nic<'_>) -> Result<(), NetError> {
        let Some(ifb) = self.read(&format!("{}/ifb", nic.directory())).await? else { return Ok(()) };
        self.run("teardown", nic, Some(&ifb)).await.map_err(|said| self.failed("teardown", nic, said))
    }

    /// Takes one nic's buffer down, whose intermediate device is `ifb`, and has the script undo its part.
    pub(super) async fn take_down(
        &self,
        nic: Nic<'_>,
        ifb: &str,
        ending: Ending,
        drain: Duration,
    ) -> Result<(), NetError> {
        let (vif, ifb) = (nic.vif.to_owned(), ifb.to_owned());
        blocking(move |conn| take_down(conn, &vif, &ifb, ending, drain, IfbFate::Keep)).await?;
        if ending == Ending::Hold {
            return Ok(());
        }
        let undone = self.teardown(nic).await;
        if ending == Ending::Discard {
            // The stock script removes the whole ingress qdisc, and the seal with it. The guest is frozen already.
            let vif = nic.vif.to_owned();
            blocking(move |conn| match conn.link(&vif)? {
                Some(link) => conn.add_seal(On { name: &vif, index: link.index }),
                None => Ok(()),
            })
            .await?;
        }
        undone
    }

    /// After a crash: takes down what the script had set up for these interfaces of a domain (`vifDOMID.DEVID`).
    /// Does nothing for an interface that the script has no device for.
    ///
    /// # Errors
    /// The first step that failed; a failed `Discard` leaves everything closed.
    pub async fn recover(&self, domid: u32, vifs: &[String], ending: Ending) -> Result<(), NetError> {
        for vif in vifs {
            let devid = vif.strip_prefix("vif").and_then(|v| v.split_once('.')).and_then(|(_, d)| d.parse().ok());
            let Some(devid) = devid else { continue };
            let nic = Nic { domid, devid, vif };
            if let Some(ifb) = self.read(&format!("{}/ifb", nic.directory())).await? {
                self.take_down(nic, &ifb, ending, DRAIN).await?;
            }
        }
        Ok(())
    }

    async fn read(&self, path: &str) -> Result<Option<String>, NetError> {
        let value = self.store.read(path).await.map_err(|e| NetError::Store(e.to_string()))?;
        Ok(value.filter(|value| !value.is_empty()))
    }

    fn failed(&self, doing: &'static str, nic: Nic<'_>, said: String) -> NetError {
        NetError::Script { script: self.path.display().to_string(), doing, vif: nic.vif.to_owned(), said }
    }

    async fn run(&self, doing: &str, nic: Nic<'_>, ifb: Option<&str>) -> Result<(), String> {
        let mut command = Command::new(&self.path);
        command.arg(doing).env("vifname", nic.vif).env("XENBUS_PATH", nic.directory());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.process_group(0).kill_on_drop(true);
        if let Some(ifb) = ifb {
            command.env("REMUS_IFB", ifb);
        }
        let child = command.spawn().map_err(|e| format!("cannot run it: {e}"))?;
        let group = child.id().map(|id| Pid::from_raw(id.cast_signed()));
        let output = match tokio::time::timeout(PATIENCE, child.wait_with_output()).await {
            Ok(output) => output.map_err(|e| e.to_string())?,
            Err(_) => {
                if let Some(group) = group {
                    let _ = killpg(group, Signal::SIGKILL);
                }
                return Err(format!("it was killed after {} s", PATIENCE.as_secs()));
            }
        };
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().replace('\n', "; ");
        if !output.stdout.is_empty() || !output.stderr.is_empty() {
            tracing::info!(script = %self.path.display(), doing, vif = nic.vif, stdout = text(&output.stdout), stderr = text(&output.stderr));
        }
        if output.status.success() {
            return Ok(());
        }
        Err(format!("{}: {}", output.status, text(&output.stderr)))
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce(&mut Conn) -> Result<T, NetError> + Send + 'static,
) -> Result<T, NetError> {
    tokio::task::spawn_blocking(move || work(&mut Conn::open()?)).await.unwrap_or(Err(NetError::NoWorker))
}
