//! The fuzz targets on the stable compiler: the corpora replayed, arbitrary bytes, and the corpora mutated.
//!
//! `BLESS=1` writes the first inputs of the corpora anew. Inputs that found something are added there by hand, with a name that says what.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use remusd::ids::{Generation, Nonce, ProtectionId};
use remusd::link::pages::{Effort, PageEncoder};
use remusd::stream::{PAGE_SIZE, PageBatch};
use remusd::witness::record::{Attempt, Host, HostId, RECORD_VERSION, Record, RecordState};

#[path = "../fuzz/targets.rs"]
mod targets;

fn folder(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let mut inputs: Vec<_> = fs::read_dir(folder(target))
        .unwrap_or_else(|error| panic!("no corpus of {target}: {error}"))
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(path).unwrap())
        })
        .collect();
    inputs.sort();
    inputs
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap()).collect()
}

/// Valid inputs of every kind.
fn seeds() -> Vec<(&'static str, String, Vec<u8>)> {
    let mut seeds = Vec::new();
    let mut add =
        |target: &'static str, name: &str, bytes: &[u8]| seeds.push((target, name.to_owned(), bytes.to_vec()));
    for (n, line) in include_str!("../src/link/codec/golden.txt").lines().enumerate() {
        let (name, bytes) = line.split_once(' ').unwrap();
        // As it came, and with the checksums put right after a mutation.
        for how in [0, 255] {
            add("frames", &format!("{name}-{n}-{how}"), &[&[how], &hex(bytes)[..]].concat());
        }
    }
    let mut encoder = PageEncoder::new(1 << 18);
    let mut session = Vec::new();
    for epoch in 0..3u64 {
        encoder.begin();
        // Text, zeros, and a word that changes.
        let page = |gfn: u64| match gfn {
            0 => vec![0; PAGE_SIZE],
            1 => (0..PAGE_SIZE).map(|at| (at / 40) as u8 ^ epoch as u8).collect(),
            _ => [&[7; PAGE_SIZE - 8][..], &epoch.to_le_bytes()].concat(),
        };
        let batch = PageBatch { entries: (0..3).collect(), data: (0..3).flat_map(page).collect::<Vec<u8>>().into() };
        for part in encoder.encode(&batch, Effort::Dense) {
            let how = (u16::try_from(part.len()).unwrap() << 1 | 1).to_le_bytes();
            session.extend_from_slice(&how);
            session.extend_from_slice(&part);
        }
        encoder.commit();
    }
    add("pages", "session", &session);
    for (name, bytes) in [
        ("remus-pvh", &include_bytes!("../src/stream/testdata/remus-pvh.bin")[..]),
        ("remus-hvm", &include_bytes!("../src/stream/testdata/remus-hvm.bin")[..]),
    ] {
        add("streams", name, &[&[9], bytes].concat());
    }
    add(
        "xenstore",
        "pvh",
        b"vif 0 libxl /local/domain/0/backend/vif/7/0 handle=0 mac=00:16:3e:00:00:01 bridge=xenbr0 script=vif-bridge\n\
          vbd 51712 libxl /local/domain/0/backend/vbd/7/51712 params=/dev/vg/g mode=w device-type=disk dev=xvda type=phy\n\
          console 0 libxl /local/domain/0/backend/console/7/0\nsuspend 0 guest",
    );
    add(
        "xenstore",
        "by-the-guest",
        b"vif 3 guest /local/domain/0/backend/vif/1/0\nvbd 1 guest /local/domain/7/fake\npci 0 guest x\nvfb 0 libxl y",
    );
    for (method, parameters) in [
        ("Status", r#"{"domain":"g"}"#),
        ("FollowEvents", r#"{"kinds":["protected"],"after":7}"#),
        ("Protect", r#"{"domain":"g","target":{"host":"b"},"options":{"interval_ms":100},"tag":"t"}"#),
        ("Protect", r#"{"domain":"g","target":{"tls":"b"},"foreground":true}"#),
        ("Failover", r#"{"domain":"g","primary_is_off":true}"#),
        ("Recover", r#"{"domain":null,"assume_owner":true}"#),
        ("Abort", r#"{"job":1}"#),
    ] {
        let call = format!(r#"{{"method":"org.remus.Control.{method}","parameters":{parameters},"more":true}}"#);
        add("api", &format!("{method}-{}", parameters.len()), call.as_bytes());
    }
    let uuid = "00000000-0000-0000-0000-000000000007";
    let certificate = "MIIBAg==";
    add("state", "primary", format!(r#"{{"version":1,"uuid":"{uuid}","name":"g","domid":7,"generation":3,"nonce":"{uuid}","armed":true,"target":{{"tls":{{"host":"b","id":"{uuid}"}}}},"options":{{}},"devices":[{{}}],"vifs":["vif7.0"],"config":"{{}}","monitor":true,"helper":[1,2]}}"#).as_bytes());
    add("state", "incoming", format!(r#"{{"version":1,"uuid":"{uuid}","name":"g","generation":3,"nonce":"{uuid}","phase":"receiving","activated":null,"party":"{uuid}"}}"#).as_bytes());
    add("state", "monitor", format!(r#"{{"uuid":"{uuid}","domid":7,"name":"g","config":"{{}}"}}"#).as_bytes());
    add("state", "identity", format!(r#"{{"version":1,"id":"{uuid}","current":{{"certificate":"{certificate}","key":"AAEC","created_ms":1,"expires_ms":2}},"next":null}}"#).as_bytes());
    add("state", "peers", format!(r#"{{"version":1,"peers":[{{"id":"{uuid}","name":"b","address":"10.0.0.2","port":7368,"paired_ms":1,"pins":[{{"certificate":"{certificate}","added_ms":1,"until_ms":2}}]}}]}}"#).as_bytes());
    let host = |id: u128, name: &str| Host { id: HostId(ProtectionId::from_u128(id)), name: name.into() };
    let record = Record {
        version: RECORD_VERSION,
        uuid: ProtectionId::from_u128(7),
        generation: Generation(3),
        nonce: Nonce(ProtectionId::from_u128(4)),
        state: RecordState::Armed,
        owner: host(1, "a"),
        peer: host(2, "b"),
        attempt: Attempt(ProtectionId::from_u128(5)),
    };
    add("witness", "armed", &[&[7], record.to_json().as_bytes()].concat());
    let offer = format!(r#"{{"version":1,"host":"{uuid}","name":"b","certificate":"{certificate}","port":7368}}"#);
    add("pairing", "offer", format!(r#"{{"offer":{offer}}}"#).as_bytes());
    add("pairing", "pin", format!(r#"{{"pin":{{"offer":{offer},"address":"10.0.0.1"}}}}"#).as_bytes());
    add("pairing", "checked", br#"{"checked":"not reached"}"#);
    add("pairing", "announce", format!(r#"{{"announce":"{certificate}"}}"#).as_bytes());
    add("pairing", "refused", br#"{"refused":"no"}"#);
    add("pairing", "rotate", br#"{"rotate-keys":{"force":true}}"#);
    add("pairing", "fingerprint", b"SHA256:ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0");
    add("config", "example", include_bytes!("../../scripts/remusd.toml"));
    add("config", "all", b"[listen]\naddress = \"10.0.0.1\"\nport = 7000\n[control]\ngroup = \"adm\"\n");
    seeds
}

#[test]
fn the_corpora_are_replayed() {
    if std::env::var_os("BLESS").is_some() {
        for (target, name, bytes) in seeds() {
            fs::create_dir_all(folder(target)).unwrap();
            fs::write(folder(target).join(name), bytes).unwrap();
        }
    }
    for (target, run) in targets::ALL {
        let inputs = corpus(target);
        assert!(!inputs.is_empty(), "{target} has no inputs");
        for (name, bytes) in inputs {
            println!("{target}/{name}");
            run(&bytes);
        }
    }
}

/// A corpus whose inputs are refused at the first byte tests nothing.
#[test]
fn the_seeds_are_valid() {
    use remusd::link::codec::Decoder;
    use remusd::stream::{Chunked, SessionParser};

    let mut seen = std::collections::BTreeSet::new();
    for (target, name, bytes) in seeds() {
        seen.insert(target);
        let json = |ok: bool| assert!(ok, "{target}/{name} is not understood");
        match target {
            "frames" => {
                let mut decoder = Decoder::accepting();
                decoder.push(&bytes[1..]);
                let first = decoder.next_frame();
                let opens = name.starts_with("HELLO");
                assert_eq!(matches!(first, Ok(Some(_))), opens, "{name}: {first:?}");
            }
            "streams" => {
                let mut parser = Chunked::new(SessionParser::new());
                parser.feed(bytes::Bytes::from(bytes[1..].to_vec()), &mut Vec::new()).unwrap();
            }
            "api" => json(remusd::api::wire::Call::parse(&bytes).unwrap().asked().is_ok()),
            "witness" => {
                let uuid = remusd::ids::ProtectionId::from_u128(u128::from(bytes[0]));
                remusd::witness::record::Record::from_json(uuid, &bytes[1..]).unwrap();
            }
            "pages" => {
                let mut decoder = remusd::link::pages::PageDecoder::new(1 << 18);
                let mut rest = bytes.as_slice();
                let mut parts = 0;
                while let Some((how, next)) = rest.split_first_chunk::<2>() {
                    let (part, later) = next.split_at(usize::from(u16::from_le_bytes(*how) / 2));
                    decoder.begin();
                    decoder.decode(bytes::Bytes::copy_from_slice(part)).unwrap();
                    decoder.commit();
                    (rest, parts) = (later, parts + 1);
                }
                assert_eq!(parts, 3);
            }
            "config" => json(remusd::config::Config::parse(std::str::from_utf8(&bytes).unwrap()).is_ok()),
            "state" => {
                let ok = match name.as_str() {
                    "primary" => serde_json::from_slice::<remusd::state::PrimaryRecord>(&bytes).err(),
                    "incoming" => serde_json::from_slice::<remusd::backup::record::IncomingRecord>(&bytes).err(),
                    "monitor" => serde_json::from_slice::<remusd::daemon::monitor::MonitorRecord>(&bytes).err(),
                    "identity" => serde_json::from_slice::<remusd::pair::keyring::Identity>(&bytes).err(),
                    _ => serde_json::from_slice::<remusd::pair::keyring::PeersFile>(&bytes).err(),
                };
                assert!(ok.is_none(), "{name}: {ok:?}");
            }
            _ => {}
        }
    }
    assert_eq!(seen.len(), targets::ALL.len());
}

/// One change of an input.
#[derive(Clone, Debug)]
enum Change {
    Flip(prop::sample::Index, u8),
    Set(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Drop(prop::sample::Index, usize),
    Repeat(prop::sample::Index, usize),
    Insert(prop::sample::Index, Vec<u8>),
}

fn change() -> impl Strategy<Value = Change> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        4 => (at(), 0..8u8).prop_map(|(at, bit)| Change::Flip(at, bit)),
        3 => (at(), prop::sample::select(vec![0, 1, 0x7f, 0x80, 0xff, b'"', b'{', b'9', b'-'])).prop_map(|(at, b)| Change::Set(at, b)),
        1 => at().prop_map(Change::Cut),
        1 => (at(), 1..64usize).prop_map(|(at, n)| Change::Drop(at, n)),
        1 => (at(), 1..64usize).prop_map(|(at, n)| Change::Repeat(at, n)),
        1 => (at(), prop::collection::vec(any::<u8>(), 1..16)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
    ]
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    if bytes.is_empty() {
        return;
    }
    let len = bytes.len();
    match change {
        Change::Flip(at, bit) => bytes[at.index(len)] ^= 1 << bit,
        Change::Set(at, byte) => bytes[at.index(len)] = *byte,
        Change::Cut(at) => bytes.truncate(at.index(len)),
        Change::Drop(at, n) => {
            let at = at.index(len);
            bytes.drain(at..(at + n).min(len));
        }
        Change::Repeat(at, n) => {
            let at = at.index(len);
            let part = bytes[at..(at + n).min(len)].to_vec();
            bytes.splice(at..at, part);
        }
        Change::Insert(at, new) => {
            let at = at.index(len);
            bytes.splice(at..at, new.iter().copied());
        }
    }
}

fn cases(cases: u32) -> ProptestConfig {
    // What fails is added to the corpus, where everybody has it.
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        for (_, run) in targets::ALL {
            run(&bytes);
        }
    }
}

proptest! {
    #![proptest_config(cases(400))]

    #[test]
    fn mutated_inputs(which in any::<prop::sample::Index>(), changes in prop::collection::vec(change(), 1..6)) {
        for (target, run) in targets::ALL {
            let inputs = corpus(target);
            let (_, mut bytes) = inputs[which.index(inputs.len())].clone();
            for change in &changes {
                apply(&mut bytes, change);
            }
            run(&bytes);
        }
    }
}
