//! A real etcd beside the client: the witness of the safety scenarios, and what can happen to it.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::net::{CLIENT_ADDRESS, NetNs};
use crate::pair::Pair;
use crate::run::Child;
use crate::wait::wait_until;

const PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;

/// How long etcd may take to answer on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// An etcd of one member in the client's namespace, on the data network: cutting a host from the client cuts it from the witness.
/// Ends with this value.
#[derive(Debug)]
pub struct Etcd {
    netns: Arc<NetNs>,
    dir: PathBuf,
    log: PathBuf,
    process: Option<Child>,
}

impl Etcd {
    /// Starts it, empty, and waits until it answers.
    pub fn start(pair: &Pair) -> Result<Self> {
        let mut etcd = Self::of(pair);
        if etcd.dir.exists() {
            std::fs::remove_dir_all(&etcd.dir)?;
        }
        etcd.run()?;
        Ok(etcd)
    }

    /// Starts it on the data that were kept with [`crate::host::Snapshot::Armed`].
    pub fn start_as_kept(pair: &Pair) -> Result<Self> {
        let mut etcd = Self::of(pair);
        copy(&etcd.kept(), &etcd.dir)?;
        etcd.run()?;
        Ok(etcd)
    }

    fn of(pair: &Pair) -> Self {
        let dir = pair.run_dir().join("etcd");
        Self { netns: pair.client_ns().clone(), dir, log: pair.logs().join("etcd.log"), process: None }
    }

    fn kept(&self) -> PathBuf {
        self.dir.with_extension("kept")
    }

    /// What `--witness` is given.
    #[must_use]
    pub fn url() -> String {
        format!("http://{CLIENT_ADDRESS}:{PORT}")
    }

    /// Ends it at once. Its data stays.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Starts it on the data that it had.
    pub fn run(&mut self) -> Result<()> {
        let (client, peer) = (Self::url(), format!("http://127.0.0.1:{PEER_PORT}"));
        let mut command = Child::command("etcd");
        command.arg("--data-dir").arg(&self.dir).args(["--name", "witness", "--logger", "zap"]);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("witness={peer}")]);
        // Data in memory would do: a busy disk must not make it look broken.
        command.arg("--unsafe-no-fsync");
        let log = std::fs::File::options().create(true).append(true).open(&self.log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.process = Some(self.netns.call(move || Child::spawn("etcd", &mut command))??);
        wait_until(PATIENCE, "etcd answers", || Ok(self.ctl(&["endpoint", "health"]).is_ok().then_some(())))
    }

    /// Stops it, throws its data away and starts it anew: another cluster, which knows nothing.
    pub fn wipe(&mut self) -> Result<()> {
        self.stop();
        std::fs::remove_dir_all(&self.dir)?;
        self.run()
    }

    /// Ends it, and keeps its data for [`Etcd::start_as_kept`].
    pub fn keep(&mut self) -> Result<()> {
        self.stop();
        copy(&self.dir, &self.kept())
    }

    /// Stops its process from running, or lets it run again; connections stay open meanwhile.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        let process = self.process.as_ref().context("etcd is stopped")?;
        process.signal(if frozen { Signal::SIGSTOP } else { Signal::SIGCONT })
    }

    /// Every record in it, as it is stored.
    pub fn records(&self) -> Result<Vec<serde_json::Value>> {
        let text = self.ctl(&["get", "--prefix", "/remusd/witness/", "--print-value-only"])?;
        let lines = text.lines().filter(|line| !line.trim().is_empty());
        lines.map(|line| serde_json::from_str(line).with_context(|| format!("a witness record: {line}"))).collect()
    }

    fn ctl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Child::command("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--command-timeout", "5s", "--endpoints", &Self::url()]).args(arguments);
        let output = self.netns.call(move || command.output())??;
        ensure!(output.status.success(), "etcdctl: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(String::from_utf8(output.stdout)?)
    }
}

fn copy(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    if to.exists() {
        std::fs::remove_dir_all(to)?;
    }
    let status = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status()?;
    ensure!(status.success(), "cannot copy {} to {}", from.display(), to.display());
    Ok(())
}
