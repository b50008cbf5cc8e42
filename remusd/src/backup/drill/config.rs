//! The configuration of a domain that can reach nothing and nobody.

use serde_json::{Map, Value, json};

use crate::ids::ProtectionId;

/// The members of libxl's `domain_config` (`libxl_types.idl` of 4.17) that a domain cannot do without. Everything else is a device or
/// says what a monitor would do, and this domain has neither.
const KEPT: [&str; 2] = ["c_info", "b_info"];

/// As `config`, with another identity and without any device.
///
/// # Errors
/// A sentence.
pub(super) fn isolated(config: &[u8], name: &str, uuid: ProtectionId) -> Result<String, String> {
    let config: Value = serde_json::from_slice(config).map_err(|error| format!("its configuration: {error}"))?;
    let all = config.as_object().ok_or("its configuration is no object")?;
    let mut kept: Map<String, Value> =
        all.iter().filter(|(member, _)| KEPT.contains(&member.as_str())).map(|(m, v)| (m.clone(), v.clone())).collect();
    let info = kept.get_mut("c_info").and_then(Value::as_object_mut).ok_or("its configuration has no c_info")?;
    info.insert("name".into(), json!(name));
    info.insert("uuid".into(), json!(uuid.to_string()));
    // Another domain's id.
    info.remove("domid");
    for end in ["on_poweroff", "on_reboot", "on_watchdog", "on_crash", "on_soft_reset"] {
        kept.insert(end.into(), json!("destroy"));
    }
    serde_json::to_string(&kept).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drilled_domain_has_no_device_and_another_identity() {
        let text = json!({
            "c_info": { "name": "web", "uuid": "00000000-0000-0000-0000-000000000001", "domid": 7, "type": "pvh" },
            "b_info": { "max_vcpus": 2, "type.pvh": {} },
            "nics": [{ "devid": 0, "bridge": "xenbr0" }],
            "disks": [{ "vdev": "xvda" }],
            "channels": [{ "devid": 0 }],
            "p9s": [{ "tag": "x" }],
            "on_reboot": "restart",
        });
        let isolated = isolated(text.to_string().as_bytes(), "web--drill", ProtectionId::from_u128(2)).unwrap();
        let value: Value = serde_json::from_str(&isolated).unwrap();
        assert_eq!(value["c_info"]["name"], "web--drill");
        assert_eq!(value["c_info"]["uuid"], "00000000-0000-0000-0000-000000000002");
        assert_eq!(value["c_info"]["type"], "pvh");
        assert_eq!(value["b_info"]["max_vcpus"], 2);
        assert_eq!(value["on_reboot"], "destroy");
        let members: Vec<_> = value.as_object().unwrap().keys().filter(|m| !m.starts_with("on_")).collect();
        assert_eq!(members, ["b_info", "c_info"]);
        assert!(value["c_info"].get("domid").is_none());
        assert!(super::isolated(b"[]", "x", ProtectionId::nil()).is_err());
    }
}
