//! What is measured, and how it is started and ended.

use std::time::Duration;

use anyhow::{Result, bail};
use remusd::api::Role;
use serde::Serialize;

use super::Load;
use crate::host::Running;
use crate::pair::Pair;
use crate::protection::{Carrier, Guest, PATIENCE, no_copy, protect_over, row};
use crate::wait::wait_until;

/// Who makes the checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// Nobody.
    Unprotected,
    /// Stock `xl remus`, memory only: Debian's build has no network buffer.
    Stock,
    /// remusd with Xen's save helper.
    SaveHelper,
    /// remusd with its own engine.
    Native,
    /// remusd with Xen's save helper at the load's interval, holding output: what stock's users have where it has a network buffer.
    Held,
    /// remusd with its own engine and `--interval auto`, holding output.
    Auto,
}

impl Subject {
    /// For the table.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unprotected => "unprotected",
            Self::Stock => "stock xl remus",
            Self::SaveHelper => "save-helper",
            Self::Native => "native",
            Self::Held => "save-helper, output held",
            Self::Auto => "native, auto, output held",
        }
    }

    /// Whether remusd makes them.
    #[must_use]
    pub fn is_ours(self) -> bool {
        !matches!(self, Self::Unprotected | Self::Stock)
    }
}

/// Where the checkpoints go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// Nowhere.
    Blackhole,
    /// To the other host, by ssh.
    Ssh,
}

/// What xl lacks: the hypercall, and the word to xenstored that the domain's shutdown is over.
const RESUME: &str = r#"
import ctypes, sys
domid = int(sys.argv[1])
xc = ctypes.CDLL("libxenctrl.so.4.17")
xc.xc_interface_open.restype = ctypes.c_void_p
handle = ctypes.c_void_p(xc.xc_interface_open(None, None, 0))
guest = ctypes.CDLL("libxenguest.so.4.17")
assert guest.xc_domain_resume(handle, ctypes.c_uint32(domid), 1) == 0, "xc_domain_resume"
xs = ctypes.CDLL("libxenstore.so.4")
xs.xs_open.restype = ctypes.c_void_p
assert xs.xs_resume_domain(ctypes.c_void_p(xs.xs_open(0)), ctypes.c_uint(domid)), "xs_resume_domain"
"#;

/// Running checkpoints.
pub(super) enum Checkpoints {
    None,
    Stock { _command: Running, way: Way },
    Ours,
}

impl Checkpoints {
    /// Starts them; returns when the first copy is done.
    pub(super) fn start(pair: &Pair, subject: Subject, way: Way, load: Load) -> Result<Self> {
        let a = pair.a();
        let interval = load.interval_ms;
        match subject {
            Subject::Unprotected => Ok(Self::None),
            Subject::Stock => {
                let to = match way {
                    Way::Blackhole => "-b",
                    Way::Ssh => "",
                };
                let command =
                    a.spawn(&format!("xl remus -F {to} -n -d -i {interval} guest hostb >/root/xl-remus.log 2>&1"))?;
                // It says nothing: the first copy is done when the guest has been suspended, after which its helper goes on.
                wait_until(PATIENCE, "stock's save helper", || {
                    Ok(a.run("pgrep -x libxl-save-help")?.ok().then_some(()))
                })?;
                if way == Way::Ssh {
                    wait_until(PATIENCE, "stock's copy on the other host", || {
                        Ok(pair.b().run("xl domid guest--incoming")?.ok().then_some(()))
                    })?;
                }
                Ok(Self::Stock { _command: command, way })
            }
            Subject::SaveHelper | Subject::Native | Subject::Held | Subject::Auto => {
                let engine = match subject {
                    Subject::Native | Subject::Auto => "native",
                    _ => "save-helper",
                };
                let interval = if subject == Subject::Auto { "auto".into() } else { interval.to_string() };
                let held = matches!(subject, Subject::Held | Subject::Auto);
                let (carrier, more) = match way {
                    Way::Blackhole => (Carrier::Nowhere, ""),
                    Way::Ssh if held => (Carrier::Usual, ""),
                    // As stock is run: memory alone.
                    Way::Ssh => (Carrier::Usual, "--unsafe no-netbuffer"),
                };
                protect_over(carrier, a, "guest", &format!("--engine {engine} --interval {interval} {more}"))?;
                wait_until(PATIENCE, "the first epochs", || {
                    let acked = row(a, "guest", Role::Primary)?.and_then(|r| r.acked);
                    Ok(acked.filter(|epoch| epoch.0 >= 2))
                })?;
                Ok(Self::Ours)
            }
        }
    }

    /// Ends them; the guest runs on, unprotected, and no copy stays.
    pub(super) fn end(self, pair: &Pair, guest: &Guest<'_>) -> Result<()> {
        let a = pair.a();
        match self {
            Self::None => return Ok(()),
            Self::Ours => drop(a.sh("remus unprotect guest")?),
            Self::Stock { way, .. } => {
                if way == Way::Ssh {
                    // Its receiver starts the copy when the stream ends: it goes first.
                    pair.b().sh("kill -9 $(pgrep -f '[m]igrate-receive'); xl destroy guest--incoming; true")?;
                }
                // The helper cleans up on SIGTERM, and xl then resumes the guest.
                a.sh("kill -TERM $(pgrep -x libxl-save-help) 2>/dev/null; true")?;
                wait_until(PATIENCE, "stock's end", || {
                    Ok((!a.run("pgrep -x libxl-save-help || pgrep -f '[x]l remus'")?.ok()).then_some(()))
                })?;
                if way == Way::Ssh {
                    no_copy(pair.b(), "guest")?;
                }
                // Ended in the middle of a checkpoint, stock leaves the guest suspended, and xl has no command to resume one.
                if a.sh("xl list guest | tail -1")?.split_whitespace().nth(4).is_some_and(|state| state.contains("s")) {
                    a.sh(&format!("python3 -c '{RESUME}' $(xl domid guest)"))?;
                }
            }
        }
        if guest.ask_within(Duration::from_secs(60), crate::client::Control::hello).is_err() {
            bail!("the guest does not run on after its checkpoints ended");
        }
        Ok(())
    }
}
