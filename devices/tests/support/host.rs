//! A disk service in a process of its own, for tests.

#![allow(dead_code)] // Each test uses some of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use devices::mirror::service::{Request, Response, Status, call};

pub const SIZE: u64 = 64 << 20;

/// A service of its own, in a directory of its own.
pub struct Host {
    dir: PathBuf,
    child: Option<Child>,
    limits: Vec<String>,
}

impl Host {
    /// With 16 MiB of memory.
    pub fn new(root: &Path, name: &str) -> Self {
        Self::with_limits(root, name, &["--memory", "16"])
    }

    pub fn with_limits(root: &Path, name: &str, limits: &[&str]) -> Self {
        let dir = root.join(name);
        fs::create_dir(&dir).unwrap();
        let disk = fs::File::create(dir.join("disk")).unwrap();
        disk.set_len(SIZE).unwrap();
        let mut host = Self { dir, child: None, limits: limits.iter().map(|&text| text.to_owned()).collect() };
        host.start();
        host
    }

    pub fn start(&mut self) {
        let child = Command::new(env!("CARGO_BIN_EXE_remus-disk"))
            .args(["--run", self.path("run").to_str().unwrap(), "serve", "d0", "--unlocked"])
            .args(&self.limits)
            .args(["--backing", self.path("disk").to_str().unwrap()])
            .args(["--meta", self.path("meta").to_str().unwrap()])
            .args(["--links", self.path("links").to_str().unwrap()])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.child = Some(child);
        self.until("answers", |host| call(&host.path("run/d0.ctl"), &Request::Status {}).is_ok());
    }

    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// The service's process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn ask(&self, request: &Request) -> Result<serde_json::Value, String> {
        match call(&self.path("run/d0.ctl"), request).unwrap() {
            Response::Ok(value) => Ok(value),
            Response::Error(text) => Err(text),
        }
    }

    pub fn tell(&self, request: &Request) -> serde_json::Value {
        self.ask(request).unwrap_or_else(|e| panic!("{request:?}: {e}"))
    }

    pub fn status(&self) -> Status {
        serde_json::from_value(self.tell(&Request::Status {})).unwrap()
    }

    pub fn until(&self, what: &str, mut is: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is(self) {
            assert!(Instant::now() < deadline, "{what}: {:?}", self.status());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///d0?socket={}", self.path("run/d0.nbd").display())
    }

    pub fn connect_to(&self, other: &Host) {
        let via = format!("unix:{}", other.path("run/d0.peer").display());
        self.tell(&Request::Connect { via: Some(via) });
    }

    pub fn disk(&self) -> Vec<u8> {
        fs::read(self.path("disk")).unwrap()
    }

    /// qemu-io's commands, which must all succeed.
    pub fn qemu_io(&self, commands: &[&str]) {
        let mut run = Command::new("qemu-io");
        run.args(["-f", "raw"]);
        for command in commands {
            run.args(["-c", command]);
        }
        let out = run.arg(self.uri()).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        let failed = ["failed", "rror", "mismatch"].iter().any(|word| text.contains(word));
        assert!(out.status.success() && !failed, "{commands:?}: {text}");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
    }
}

pub fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    let may_skip = std::env::var_os("REMUS_SKIP_CLIENTS").is_some();
    assert!(
        found || may_skip,
        "{program} is missing: install qemu-utils, libnbd-bin and fio, or set REMUS_SKIP_CLIENTS=1"
    );
    found
}

/// A source that is open and its copy, alike.
pub fn pair(root: &Path) -> (Host, Host) {
    let (a, b) = (Host::new(root, "a"), Host::new(root, "b"));
    a.tell(&Request::Promote { force: false });
    a.tell(&Request::Open {});
    b.tell(&Request::Demote {});
    a.connect_to(&b);
    a.until("in sync", |a| a.status().in_sync);
    (a, b)
}

pub fn alike(a: &Host, b: &Host) {
    a.until("durable", |a| a.status().in_sync && a.status().dirty == 0);
    assert!(a.disk() == b.disk(), "the disks differ");
}
